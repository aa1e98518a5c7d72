// Parts of the page that only show: a turn with its answers, bars of times, the chart of layers.

const PARTS = ["preprocess", "vision", "prefill", "decode"];

export function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

export function label(model) {
  return model.method === "none" ? "dense" : `${model.method}, CR ${model.cr.toFixed(2)}`;
}

/** A question and one empty answer for each model. */
export function turn(question, asked) {
  const answers = asked.map((model) => new AnswerView(model));
  const list = element("div", { className: "answers" }, ...answers.map((one) => one.root));
  const root = element("li", {}, element("p", { className: "question", textContent: question }), list);
  return { root, answers };
}

class AnswerView {
  constructor(model) {
    this.said = element("p", { className: "said waiting" });
    this.said.setAttribute("aria-busy", "true");
    this.more = element("div");
    const name = element("h3", { textContent: `${model.id} (${label(model)})` });
    this.root = element("article", { className: "answer" }, name, this.said, this.more);
  }

  grow(text) {
    this.said.textContent = text;
  }

  fail(message) {
    this.said.className = "said failed";
    this.said.textContent = message;
  }

  stop() {
    this.said.classList.remove("waiting");
    this.said.removeAttribute("aria-busy");
  }

  /** The answer is complete; `scale` milliseconds are the whole width of a bar. */
  finish(reply, scale) {
    this.stop();
    const notes = [...(reply.warnings ?? [])];
    if (reply.finish === "length") notes.push("the answer was cut at its longest");
    const shown = notes.map((note) => element("p", { className: "note", textContent: note }));
    this.more.replaceChildren(...shown, ...bar(reply.timings, scale));
  }
}

export function total(timings) {
  return parts(timings).reduce((sum, [, value]) => sum + value, 0);
}

function parts(timings) {
  return PARTS.map((kind) => [kind, timings[`${kind}_ms`]]);
}

function bar(timings, scale) {
  const told = parts(timings);
  const filled = told.map(([kind, value]) => {
    const part = element("i", { className: kind });
    part.style.width = `${(100 * value) / scale}%`;
    return part;
  });
  const each = timings.decode_tokens ? timings.decode_ms / timings.decode_tokens : 0;
  const lines = told.map(([kind, value]) => {
    const more = kind === "decode" && each ? ` (${each.toFixed(1)} a token)` : "";
    const reused = kind === "vision" && value === 0 ? "reused" : `${value.toFixed(1)} ms${more}`;
    const key = element("span", { className: `key ${kind}` });
    return element("li", {}, key, `${kind} ${reused}`);
  });
  const drawn = element("div", { className: "bar" }, ...filled);
  drawn.setAttribute("aria-hidden", "true"); // the list says the same
  return [drawn, element("ul", { className: "times" }, ...lines)];
}

/** Tokens that enter each layer, as steps, with a line at the chosen one. */
export function chart(svg, pruned, layer) {
  const { layers, total } = pruned;
  const x = (at) => (1000 * at) / layers;
  const y = (count) => 40 - (36 * count) / total;
  let path = `M0 ${y(total)}`;
  for (let at = 1; at <= layers; at += 1) path += `H${x(at - 0.5)}V${y(pruned.count(at))}`;
  path += `H${x(layers)}`;
  svg.setAttribute("viewBox", "0 0 1000 44");
  svg.setAttribute("preserveAspectRatio", "none");
  const draw = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  svg.replaceChildren(
    draw("path", { class: "area", d: `${path}V42H0Z` }),
    draw("path", { class: "step", d: path }),
    draw("line", { class: "here", x1: x(layer), x2: x(layer), y1: 0, y2: 44 }),
  );
}
