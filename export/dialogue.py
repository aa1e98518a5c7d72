"""Dialogues about samples, played through the windows of a bundle's graphs by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgeprune.errors import ParityError, brief
from edgeprune.export.trace import HIDDEN
from edgeprune.export.unrounded import without_rounding
from edgeprune.export.upcast import upcast
from edgeprune.export.windows import Cut, Window
from edgeprune.graphs import DECODER, JOIN, VISION, GraphRecord
from edgeprune.models._activations import Activations, Kept
from edgeprune.models._dialogues import Call, Outcome, calls_about
from edgeprune.models._eager import Eager
from edgeprune.models._processor import Prompt

REPORT = "Please report the model and the command"
ROOM = 128
"""Tokens of text that a cache has room for at least."""

Array = NDArray[Any]


@dataclass(frozen=True)
class Played:
    """A sample between two windows of a graph; everything once for each call."""

    inputs: tuple[tuple[Tensor, ...], ...]  # of the graph, in the order of `WindowedGraph.plain`
    carried: tuple[tuple[Tensor, ...], ...] = ()  # what later windows need, in the order of `alive`
    entered: tuple[Tensor, ...] = ()  # hidden states that entered the last window
    shown: tuple[tuple[Tensor, ...], ...] = ()  # of each of its stages, what it gave
    chosen: tuple[tuple[Tensor, ...], ...] = ()  # and, once, the survivors' indices of its sites

    def at(self, stage: int) -> tuple[Tensor, ...]:
        """Hidden states that entered a stage, counted from the window's first."""
        return self.shown[stage - 1] if stage else self.entered


class WindowedGraph:
    """A graph in ONNX Runtime, some of its stages at a time; every present is a new array."""

    def __init__(
        self,
        file: Path,
        record: GraphRecord,
        windows: Sequence[range],
        counts: Sequence[int],  # visual tokens that enter each layer
        *,
        exact: bool = True,
        wide: bool = False,
    ) -> None:
        """`exact`: products with quantised weights compute in float32, else as they run on a
        device, with activations rounded. `wide`: all is computed in float32."""
        with onnxruntime_errors("cannot load"):
            model = onnx.load(file, load_external_data=False)
            if exact:
                without_rounding(model)
            if wide:
                upcast(model)
        self.file, self.record, self.counts, self.exact = file, record, counts, exact
        self.cut = Cut(model, record)
        self.windows = self.cut.windows(windows)
        self.types = dict[str, int]()
        self.plain = [t.name for t in record.inputs if not t.role.startswith("past_")]
        self.dtype = torch.float32 if wide else _dtype(model.graph.input, record)

    def begin(self, calls: Sequence[dict[str, Tensor]]) -> Played:
        """A sample before the graph; inputs of each call by their role."""
        roles = {tensor.name: tensor.role for tensor in self.record.inputs}
        return Played(tuple(tuple(c[roles[n]] for n in self.plain) for c in calls))

    @contextmanager
    def opened(self, number: int) -> Iterator[Callable[[Played], Played]]:
        """While this is open, samples go through a window."""
        window = self.windows[number]
        with onnxruntime_errors("cannot load"):
            session = self._session(self.cut.proto(window, self.types))
        for output in session.get_outputs():
            self.types[output.name] = _TYPES[output.type]
        yield lambda played: self._run(session, number, played)

    def alive(self, number: int) -> list[str]:
        """Values that windows behind a window need from it or from those before."""
        later = {name for window in self.windows[number + 1 :] for name in window.carried}
        made = {name for window in self.windows[: number + 1] for name in window.outputs}
        return sorted(later & made)

    def _run(self, session: Any, number: int, played: Played) -> Played:
        window, alive = self.windows[number], self.alive(number)
        before = self.alive(number - 1) if number else []
        read = {value.name for value in session.get_inputs()}
        caches = self._caches(window, played)
        found = list[dict[str, Tensor]]()
        held = played.carried or ((),) * len(played.inputs)
        for inputs, carried in zip(played.inputs, held, strict=True):
            values = dict(zip(self.plain, inputs, strict=True)) | caches
            values |= dict(zip(before, carried, strict=True))
            feeds = {name: values[name].numpy() for name in read}
            with onnxruntime_errors("cannot run"):
                made = session.run(window.outputs, feeds)
            values |= dict(zip(window.outputs, map(torch.from_numpy, made), strict=True))
            caches = {
                cache.past.name: values[cache.present.name]
                for cache in self.record.caches
                if cache.past.name in caches
            }
            found.append(values)
        return Played(
            played.inputs,
            tuple(tuple(values[name] for name in alive) for values in found),
            played.shown[-1] if played.shown else (),
            tuple(self._shown(stage, found) for stage in window.stages),  # before what is chosen
            tuple(self._chosen(stage, found[0]) for stage in window.stages),
        )

    def _caches(self, window: Window, played: Played) -> dict[str, Tensor]:
        """Empty caches of a window's layers, with room for the whole dialogue."""
        names = [n for n in self.plain if n in ("prefix_ids", "text_ids")]
        at = [self.plain.index(name) for name in names]
        text = sum(inputs[index].shape[1] for inputs in played.inputs for index in at)
        caches = dict[str, Tensor]()
        for cache in self.record.caches:
            if cache.past.name in window.inputs:
                index = cache.index
                capacity = self.counts[index] + max(text, ROOM)
                sizes = {f"capacity.{index}": capacity, f"past.{index}": 0}
                dtype = torch.float32 if cache.past.dtype == "fp32" else self.dtype
                caches[cache.past.name] = torch.zeros(cache.past.shape(sizes), dtype=dtype)
        return caches

    def _shown(self, stage: int, found: Sequence[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """What a stage gives: hidden states, visual tokens or logits [vocabulary]."""
        if stage < self.cut.stages - 1:
            return tuple(values[f"{HIDDEN}{stage}"] for values in found)
        if visual := self.record.output("visual"):
            return tuple(values[visual.name] for values in found)
        logits = self.record.output("logits")
        assert logits is not None  # a decoder's graph
        return tuple(values[logits.name][0, 0].float() for values in found)

    def _chosen(self, stage: int, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        names = [t.name for t in self.record.outputs if t.role in ("kept", "visual_indices")]
        return tuple(values[name] for name in names if self.cut.due(name) == stage)

    def _session(self, model: bytes) -> Any:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.log_severity_level = 4  # without bound buffers the cache is copied: meant here
        options.add_session_config_entry(WEIGHTS_FOLDER, str(self.file.parent))
        if self.exact:
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        else:  # what is rounded, is rounded as the graph says
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        return ort.InferenceSession(model, options, ["CPUExecutionProvider"])


_TYPES = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(float16)": onnx.TensorProto.FLOAT16,
    "tensor(int64)": onnx.TensorProto.INT64,
    "tensor(int32)": onnx.TensorProto.INT32,
    "tensor(bool)": onnx.TensorProto.BOOL,
}
"""Element types of what goes from one window to the next."""

WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
"""Where a session that is given a graph as bytes looks for its weights."""


def _dtype(inputs: Sequence[Any], record: GraphRecord) -> torch.dtype:
    """What a graph's floating-point inputs have."""
    kinds = {value.type.tensor_type.elem_type for value in inputs}
    return torch.float16 if onnx.TensorProto.FLOAT16 in kinds else torch.float32


class TiledGraph(WindowedGraph):
    """vision.onnx, one call for each tile, and behind its last stage join.onnx. Hidden states are
    shown of all tiles together, as the eager model has them."""

    def __init__(
        self,
        folder: Path,
        records: Mapping[str, GraphRecord],
        windows: Sequence[range],
        counts: Sequence[int],
        *,
        exact: bool,
        wide: bool,
    ) -> None:
        options = {"exact": exact, "wide": wide}
        super().__init__(folder / VISION, records[VISION], windows, counts, **options)
        self.join = WindowedGraph(folder / JOIN, records[JOIN], [range(1)], counts, **options)

    def encode_image(self, pixels: Tensor) -> Played:
        """An image before its encoder: [tiles, 3, H, W]."""
        (tensor,) = self.record.inputs
        parts = torch.split(pixels.to(self.dtype), tensor.shape({})[0])
        return self.begin([{"pixels": part} for part in parts])

    @contextmanager
    def opened(self, number: int) -> Iterator[Callable[[Played], Played]]:
        with ExitStack() as stack:
            run = stack.enter_context(super().opened(number))
            if self.windows[number].stages.stop == self.cut.stages:
                self._joined = stack.enter_context(self.join.opened(0))
            yield run

    def _shown(self, stage: int, found: Sequence[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        if stage < self.cut.stages - 1:
            return (torch.cat([values[f"{HIDDEN}{stage}"] for values in found]),)
        roles = {tensor.role: tensor.name for tensor in self.record.outputs}
        inputs = tuple(
            torch.tensor(self.counts) if t.tile is None else found[t.tile - 1][roles[t.role]]
            for t in self.join.record.inputs
        )
        joined = self._joined(Played((inputs,)))
        found[0].update(
            zip(("visual", "indices"), (*joined.shown[0], *joined.chosen[0]), strict=True)
        )
        return joined.shown[0]

    def _chosen(self, stage: int, values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        return (values["indices"],) if stage == self.cut.stages - 1 else ()


class Graphs:
    """All graphs of a bundle, in the windows of an eager model."""

    def __init__(
        self,
        folder: Path,
        records: Mapping[str, GraphRecord],  # of each graph, by its file
        eager: Eager,
        *,
        exact: bool = True,
        wide: bool = False,
    ) -> None:
        self.eager, self.activations = eager, Activations()
        self._counts = torch.tensor(eager.plan.counts)  # where they are an input
        counts, options = eager.plan.counts, {"exact": exact, "wide": wide}
        windows = eager.vision.windows()
        self.vision = TiledGraph(folder, records, windows, counts, **options)
        windows = eager.decoder.windows()
        self.decoder = WindowedGraph(folder / DECODER, records[DECODER], windows, counts, **options)

    def encode_image(self, prompt: Prompt) -> Played:
        """An image before vision.onnx."""
        return self.vision.encode_image(prompt.pixels)

    def talk(self, prompt: Prompt, visual: Tensor, indices: Tensor) -> Played:
        """A dialogue about visual tokens [1, r_1, width], before decoder.onnx."""
        visual, found = visual.to(self.decoder.dtype), list[dict[str, Tensor]]()
        for call in calls_about(prompt, self.eager.decoder.decoder):
            image = {"visual": visual, "visual_indices": indices, "counts": self._counts}
            found.append(_inputs(call) | image)
            visual, indices = visual[:, :0], indices[:0]  # the later calls have no image
        return self.decoder.begin(found)

    def outcomes(
        self,
        prompts: Sequence[Prompt],
        report: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Outcome]:
        """What the graphs make of samples; `report` is told how often a sample went through a
        window, and how often it will."""
        total, done = len(prompts) * (len(self.vision.windows) + len(self.decoder.windows)), 0
        chosen: list[list[Tensor]] = [[] for _ in prompts]

        def run(graph: WindowedGraph, kept: Kept[Played]) -> Iterator[Played]:
            nonlocal done
            for number in range(len(graph.windows)):
                with graph.opened(number) as through:
                    kept = self.activations.keep(map(through, self._noting(kept, chosen)))
                done += len(prompts)
                report(done, total)
            return self._noting(kept, chosen)

        seen = list(run(self.vision, self.activations.keep(map(self.encode_image, prompts))))
        visual = [played.shown[-1][0] for played in seen]
        talks = zip(prompts, visual, chosen, strict=True)
        begun = self.activations.keep(self.talk(p, v, kept[0]) for p, v, kept in talks)
        said = [played.shown[-1] for played in run(self.decoder, begun)]
        return [Outcome(tuple(k), v, s) for k, v, s in zip(chosen, visual, said, strict=True)]

    @staticmethod
    def _noting(kept: Kept[Played], chosen: list[list[Tensor]]) -> Iterator[Played]:
        """Samples whose choices in the last window are written down."""
        for played, found in zip(kept.drain(), chosen, strict=True):
            found += [indices for stage in played.chosen for indices in stage]
            yield played


def _inputs(call: Call) -> dict[str, Tensor]:
    return {
        "prefix_ids": call.prefix_ids,
        "text_ids": call.text_ids,
        "position": call.position,
        "lengths": call.lengths,
    }


@contextmanager
def onnxruntime_errors(what: str) -> Iterator[None]:
    """ParityError in a line where ONNX Runtime fails at a graph."""
    try:
        yield
    except Exception as error:  # onnxruntime raises a kind per status code
        raise ParityError(
            f"ONNX Runtime {what} an exported graph ({brief(error)}); nothing was written. {REPORT}"
        ) from error
