// The page: an image, questions about it, what pruning leaves of it. No state outlives the page.

import { ask, models, Refused, useKey } from "./api.js";
import { PrunedImage } from "./pruned_image.js";
import { chart, element, label, total, turn } from "./view.js";

const SAMPLES = [
  ["scene-1.png", "what digit is on the purple card ?"],
  ["scene-6.png", "what color is the star ?"],
  ["scene-7.png", "how many circles are there ?"],
];
const LARGEST = 6 << 20; // bytes that are sent as they are; larger images are made smaller
const SWEEP = 1400; // milliseconds through all layers
const EDGE = 2048; // pixels of the longer side, of those

const at = (id) => document.getElementById(id);
const state = { models: [], image: "", talks: new Map(), prunedImages: [], stop: null, touched: false };

async function start() {
  try {
    state.models = await models();
  } catch (error) {
    at("key-form").hidden = error.status !== 401;
    tell(error.status === 401 ? "This server asks for a key." : error.message);
    return;
  }
  at("key-form").hidden = true;
  tell("");
  const taken = state.models.filter((model) => model.images === 1 && model.frames === null);
  if (!taken.length) tell("The bundles here take several images or videos; ask them over the API.");
  state.models = taken;
  fill(at("model"), taken);
  at("model").value = (taken.find((model) => model.method !== "none") ?? taken[0])?.id ?? "";
  offerBeside();
}

function fill(select, list) {
  const options = list.map((model) => new Option(`${model.id} (${label(model)})`, model.id));
  select.replaceChildren(...options);
}

function offerBeside() {
  const others = state.models.filter((model) => model.id !== at("model").value);
  fill(at("beside"), others);
  at("beside").prepend(new Option("none", ""));
  at("beside").value = others.find((model) => model.method === "none")?.id ?? "";
  at("beside-label").hidden = !others.length;
  begin();
}

function asked() {
  const names = [at("model").value, at("beside").value];
  return names.filter(Boolean).map((name) => state.models.find((model) => model.id === name));
}

/** A new conversation; the image stays. */
function begin() {
  state.stop?.abort();
  state.talks = new Map(asked().map((model) => [model.id, []]));
  state.prunedImages = [];
  at("turns").replaceChildren();
  at("layers").hidden = true;
  showImage();
}

function showImage() {
  at("empty").hidden = Boolean(state.image);
  const shown = state.image ? [element("img", { src: state.image, alt: "The image to ask about" })] : [];
  at("figures").replaceChildren(...shown.map((image) => element("figure", {}, image)));
}

async function take(blob) {
  try {
    const bitmap = await createImageBitmap(blob); // it can be read
    state.image = blob.size > LARGEST ? smaller(bitmap) : await dataUri(blob);
  } catch {
    tell("This file is no image that a browser reads; choose a PNG or JPEG.");
    return;
  }
  tell("");
  begin();
}

function smaller(bitmap) {
  const scale = Math.min(1, EDGE / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas", { width: bitmap.width * scale, height: bitmap.height * scale });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(blob);
  });
}

async function submit(event) {
  event.preventDefault();
  const question = at("question").value.trim();
  if (!state.image) return tell("Pick an image first.");
  if (!question || state.stop) return undefined;
  tell("");
  busy(new AbortController());
  const chosen = asked();
  const shown = turn(question, chosen);
  at("turns").append(shown.root);
  at("question").value = "";
  const replies = [];
  try {
    for (const [index, model] of chosen.entries()) {
      // one after the other, so that neither slows the other down
      replies.push(await answer(model, question, shown.answers[index]));
    }
    const scale = Math.max(...replies.map((reply) => total(reply.timings)));
    replies.forEach((reply, index) => shown.answers[index].finish(reply, scale));
    await showPictures(chosen, replies);
  } catch (error) {
    const message = error instanceof Refused ? error.message : "The server cannot be reached.";
    if (error.name !== "AbortError") shown.answers[replies.length]?.fail(message);
  }
  shown.answers.forEach((view) => view.stop());
  busy(null);
  at("question").focus();
  shown.root.scrollIntoView({ block: "nearest" });
  return undefined;
}

async function answer(model, question, view) {
  const talk = state.talks.get(model.id);
  const image = { type: "image_url", image_url: { url: state.image } };
  const content = talk.length ? question : [image, { type: "text", text: question }];
  const messages = [...talk, { role: "user", content }];
  const reply = await ask(model.id, messages, (text) => view.grow(text), state.stop.signal);
  state.talks.set(model.id, [...messages, { role: "assistant", content: reply.text }]);
  return reply;
}

function busy(stop) {
  state.stop = stop;
  at("ask").hidden = Boolean(stop);
  at("stop").hidden = !stop;
}

async function showPictures(chosen, replies) {
  state.prunedImages = await Promise.all(replies.map((reply) => PrunedImage.of(reply.pruning)));
  const figures = state.prunedImages.map((pruned, index) => {
    pruned.caption = element("figcaption");
    pruned.name = label(chosen[index]);
    return element("figure", {}, pruned.canvas, pruned.caption);
  });
  at("figures").replaceChildren(...figures);
  const merged = state.prunedImages.some((pruned) => pruned.pruning.sites.some((site) => site.merged.length));
  at("merged-key").hidden = !merged;
  at("legend").hidden = state.prunedImages.every((pruned) => !pruned.pruning.sites.length);
  const last = Math.max(...state.prunedImages.map((pruned) => pruned.layers));
  at("layer").max = last;
  if (at("layers").hidden) {
    at("layers").hidden = false;
    sweep(last);
  } else drawLayer();
}

/** Go through the layers once, so that one sees what happens; a touch ends it. */
function sweep(last) {
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const started = performance.now();
  const step = (now) => {
    if (at("layers").hidden || state.touched) return;
    const share = still ? 1 : Math.min(1, (now - started) / SWEEP);
    at("layer").value = Math.round(share * last);
    drawLayer();
    if (share < 1) requestAnimationFrame(step);
  };
  state.touched = false;
  step(started);
}

function drawLayer() {
  const layer = Number(at("layer").value);
  for (const pruned of state.prunedImages) {
    pruned.draw(layer);
    const count = element("b", { textContent: pruned.count(layer) });
    pruned.caption.replaceChildren(`${pruned.name}: `, count, ` of ${pruned.total} tokens`);
  }
  const [first] = state.prunedImages;
  const where = layer ? `layer ${layer} of ${at("layer").max}` : "input";
  const told = `${where}: ${first.count(layer)} of ${first.total} visual tokens`;
  at("layer").setAttribute("aria-valuetext", told);
  at("layer-text").textContent = told;
  chart(at("chart"), first, Math.min(layer, first.layers));
}

async function openCamera() {
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    at("video").srcObject = stream;
    at("camera-dialog").showModal();
  } catch {
    tell("The camera cannot be used; allow it in the browser, or choose a file.");
  }
}

function closeCamera() {
  at("video").srcObject?.getTracks().forEach((track) => track.stop());
  at("video").srcObject = null;
}

function takeFrame() {
  const video = at("video");
  const canvas = element("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => blob && take(blob), "image/png");
  at("camera-dialog").close();
}

function tell(message) {
  at("notice").hidden = !message;
  at("notice").textContent = message;
}

function imageOf(transfer) {
  return [...transfer.files].find((file) => file.type.startsWith("image/"));
}

for (const [name, question] of SAMPLES) {
  const image = element("img", { src: `/page/${name}`, alt: `Sample ${name.match(/\d+/)[0]}` });
  const button = element("button", { type: "button" }, image);
  button.addEventListener("click", async () => {
    await take(await (await fetch(image.src)).blob());
    at("question").value ||= question;
    at("question").focus();
  });
  at("samples").append(element("li", {}, button));
}
at("form").addEventListener("submit", submit);
at("stop").addEventListener("click", () => state.stop?.abort());
at("model").addEventListener("change", offerBeside);
at("beside").addEventListener("change", begin);
at("layer").addEventListener("input", () => {
  state.touched = true;
  drawLayer();
});
at("file").addEventListener("change", () => at("file").files[0] && take(at("file").files[0]));
at("camera").hidden = !navigator.mediaDevices?.getUserMedia;
at("camera").addEventListener("click", openCamera);
at("take").addEventListener("click", takeFrame);
at("cancel").addEventListener("click", () => at("camera-dialog").close());
at("camera-dialog").addEventListener("close", closeCamera);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(at("key").value);
  start();
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("dragging");
});
document.addEventListener("dragleave", () => document.body.classList.remove("dragging"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("dragging");
  const file = imageOf(event.dataTransfer);
  if (file) take(file);
});
document.addEventListener("paste", (event) => {
  const file = imageOf(event.clipboardData);
  if (file) take(file);
});
start();
