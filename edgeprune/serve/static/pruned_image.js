// What is left of an image at a layer: kept patches as they are, dropped ones grey, dark and ruled,
// the centre of a merged token outlined. The same drawing as `edgeprune show`.

const MERGED = "rgb(255, 120, 0)";
const SIDE = 720; // pixels of the longer side, at least: an image of 336 is drawn larger

export class PrunedImage {
  static async of(pruning) {
    const image = new Image();
    image.src = pruning.image;
    await image.decode();
    return new PrunedImage(pruning, image);
  }

  constructor(pruning, image) {
    const scale = Math.max(1, Math.ceil(SIDE / Math.max(image.width, image.height)));
    this.canvas = document.createElement("canvas");
    this.canvas.setAttribute("role", "img");
    this.canvas.width = image.width * scale;
    this.canvas.height = image.height * scale;
    this.pruning = pruning;
    this.line = scale; // pixels of a ruling
    this.bright = this.#copy((pen) => pen.drawImage(image, 0, 0, this.canvas.width, this.canvas.height));
    this.dim = this.#copy((pen) => this.#dimmed(pen));
  }

  get layers() {
    return this.pruning.layers.length;
  }

  get total() {
    return this.pruning.visual_tokens;
  }

  /** Visual tokens that enter a layer from 1; all of them at 0, the input. */
  count(layer) {
    return layer ? this.pruning.layers[Math.min(layer, this.layers) - 1] : this.total;
  }

  /** The last site at or before a layer; none where nothing was dropped yet. */
  site(layer) {
    return this.pruning.sites.findLast((site) => site.layer <= layer);
  }

  draw(layer) {
    const pen = this.canvas.getContext("2d");
    const site = this.site(layer);
    pen.drawImage(this.bright, 0, 0);
    if (site) {
      const kept = new Set(site.kept);
      const merged = new Set(site.merged);
      for (const [index, box] of this.#boxes()) {
        if (merged.has(index)) this.#outline(pen, box);
        else if (!kept.has(index)) pen.drawImage(this.dim, ...box, ...box);
      }
    }
    const where = layer ? `layer ${layer}` : "the input";
    this.canvas.setAttribute("aria-label", `The image at ${where}: ${this.count(layer)} visual tokens`);
  }

  *#boxes() {
    const [rows, columns] = this.pruning.grid;
    const { width, height } = this.canvas;
    const at = (i, count, size) => Math.round((size * i) / count);
    for (let index = 0; index < rows * columns; index += 1) {
      const [row, column] = [Math.floor(index / columns), index % columns];
      const [x, y] = [at(column, columns, width), at(row, rows, height)];
      yield [index, [x, y, at(column + 1, columns, width) - x, at(row + 1, rows, height) - y]];
    }
  }

  #dimmed(pen) {
    const { width, height } = this.canvas;
    const pixels = this.bright.getContext("2d").getImageData(0, 0, width, height);
    const levels = pixels.data;
    for (let i = 0; i < levels.length; i += 4) {
      const grey = 0.299 * levels[i] + 0.587 * levels[i + 1] + 0.114 * levels[i + 2];
      levels[i] = levels[i + 1] = levels[i + 2] = 36 + 0.33 * grey;
    }
    pen.putImageData(pixels, 0, 0);
    pen.globalCompositeOperation = "lighter";
    pen.fillStyle = "rgb(14, 14, 14)";
    for (const [, [x, y, w, h]] of this.#boxes()) {
      pen.fillRect(x, y, w, this.line);
      pen.fillRect(x, y + this.line, this.line, h - this.line);
    }
  }

  #outline(pen, [x, y, w, h]) {
    const line = 2 * this.line;
    pen.strokeStyle = MERGED;
    pen.lineWidth = line;
    pen.strokeRect(x + line / 2, y + line / 2, w - line, h - line);
  }

  #copy(paint) {
    const copy = document.createElement("canvas");
    copy.width = this.canvas.width;
    copy.height = this.canvas.height;
    paint(copy.getContext("2d", { willReadFrequently: true }));
    return copy;
  }
}
