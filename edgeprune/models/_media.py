"""What a bundle's prompts show, and how a checkpoint's template and processor write it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from edgeprune.errors import SpecError
from edgeprune.tiling import Size, Tiling

MOST = 4096
"""Images or frames of a prompt; a bundle's manifest takes no more."""
IMAGE_SLOT = "{}"
"""In `Media.template`: a run of visual tokens."""


@dataclass(frozen=True, slots=True)
class InputOptions:
    """What a user wants a bundle frozen for; None is the family's default."""

    size: Size | None = None  # of the images
    images: int = 1  # in one prompt
    frames: int | None = None  # of a video in place of images
    tiles: int | None = None  # of an image that are encoded, beside the view of the whole

    def __post_init__(self) -> None:
        asked = (self.images, 1 if self.frames is None else self.frames)
        if wrong := [number for number in asked if not 1 <= number <= MOST]:
            raise SpecError(f"--num-images and --frames are from 1 to {MOST:,}; got {wrong[0]}")
        if self.images > 1 and self.frames is not None:
            raise SpecError("a bundle takes images or a video: leave out --num-images or --frames")
        if self.tiles is not None and self.tiles < 1:
            raise SpecError(f"--tiles is at least 1; got {self.tiles}")

    def check(self, family: str, takes: Takes) -> None:
        """SpecError where a family does not take what is asked."""
        if self.images > 1 and not takes.several:
            raise SpecError(f"{family} bundles take one image, --num-images asks for more")
        if self.frames is not None and not takes.frames:
            raise SpecError(f"{family} bundles take images, not videos; leave out --frames")
        if self.frames is not None and self.size is not None and not takes.sized_frames:
            raise SpecError("frames have the model's own size; leave out --image-size")
        if self.tiles is not None and takes.all_tiles:
            raise SpecError(f"--tiles is not for {family}: {takes.all_tiles}; leave it out")

    def choice_of(self, tiling: Tiling | None) -> Tiling | None:
        """The tiling of a family with as many tiles as are asked for; SpecError where it has no
        more."""
        if self.tiles is None:
            return tiling
        cut = 1 if tiling is None else tiling.cut
        if tiling is None or self.tiles >= cut:
            raise SpecError(
                f"--tiles {self.tiles} leaves out none of an image's {cut}; choose a larger"
                " --image-size, or leave out --tiles"
            )
        return replace(tiling, kept=self.tiles)


NAMED_TILES = (
    "its prompts name row and column of each tile, and this text is frozen with the graphs, so that"
    " which tiles are encoded cannot depend on the image"
)
"""Why families encode all tiles that the text between them names."""


@dataclass(frozen=True, slots=True)
class Takes:
    """What a family can be asked for beside one image."""

    several: bool = True  # images in a prompt
    frames: bool = False  # a video in place of images
    sized_frames: bool = False  # of a size that the user chooses
    all_tiles: str = "an image is not cut into tiles"  # why none of them is left out; empty where
    # fewer may be encoded


@dataclass(frozen=True, slots=True)
class Turns:
    """How a dialogue is written where a checkpoint has no chat template."""

    first: str  # holds {image} and {prompt}
    later: str  # holds {prompt}
    source: str  # whose template it is, for people


@dataclass(frozen=True, slots=True)
class Media:
    """The images or the video of a prompt."""

    placeholder: int  # id of the token that a chat template writes for one
    token: int  # id of a visual token
    part: str = "image"  # their type among the contents of a message: image or video
    count: int = 1
    template: str = IMAGE_SLOT  # what the checkpoint's processor writes for a placeholder
    assumed: Turns | None = None  # for one image, where a checkpoint has no chat template

    @classmethod
    def of_images(
        cls, config: Any, count: int, template: str = IMAGE_SLOT, assumed: Turns | None = None
    ) -> Media:
        token = int(config.image_token_id)
        assumed = assumed if count == 1 else None
        return cls(token, token, count=count, template=template, assumed=assumed)

    @property
    def around(self) -> tuple[str, str]:
        """Text before the first run of visual tokens and after the last, inside the placeholder."""
        pieces = self.template.split(IMAGE_SLOT)
        return pieces[0], pieces[-1]

    @property
    def runs(self) -> int:
        """Runs of visual tokens in a prompt."""
        return self.count * self.template.count(IMAGE_SLOT)
