/* The picture and its segments on canvases. */

// Pixels that are drawn on the screen: larger pictures are shown at a smaller scale, which keeps drawing quick.
const MOST_SHOWN = 3e6;
// Pixels of a picture that are painted at once when all of it is written.
const BAND = 2e6;
// Columns of the map that are read side by side, which the processor's caches hold.
const STRIP = 32;
const GREY = "#8a8d91";

function canvasOf(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

export function shownSize(width, height) {
  const scale = Math.min(1, Math.sqrt(MOST_SHOWN / (width * height)));
  return [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
}

/** The picture, upright; null where the browser cannot read such a file. */
export async function bitmapOf(file) {
  try {
    return await createImageBitmap(file, { imageOrientation: "from-image" });
  } catch {
    return null;
  }
}

/** The picture at a size, or grey where it is null. */
export function groundOf(bitmap, width, height) {
  const canvas = canvasOf(width, height);
  const context = canvas.getContext("2d");
  if (bitmap) {
    context.imageSmoothingQuality = "high";
    context.drawImage(bitmap, 0, 0, width, height);
  } else {
    context.fillStyle = GREY;
    context.fillRect(0, 0, width, height);
  }
  return canvas;
}

/** Numbers of the segments, row by row: of rows `top`..`bottom` - 1 of a width x height view of the scene. */
function sampled(scene, width, height, top, bottom) {
  const ids = new scene.map.constructor(width * (bottom - top));
  const rows = Uint32Array.from({ length: bottom - top }, (_, y) => Math.floor(((top + y + 0.5) * scene.height) / height));
  const columns = Uint32Array.from({ length: width }, (_, x) => Math.floor(((x + 0.5) * scene.width) / width) * scene.height);
  const { map } = scene;
  for (let left = 0; left < width; left += STRIP) {
    const right = Math.min(width, left + STRIP);
    for (let y = 0; y < rows.length; y++) {
      for (let x = left, at = y * width + left; x < right; x++, at++) ids[at] = map[columns[x] + rows[y]];
    }
  }
  return ids;
}

/** The colour of every number as one word of a canvas's pixel; none and hidden ones are transparent. */
function wordsOf(scene) {
  const bytes = new Uint8ClampedArray(4 * (scene.segments.length + 1));
  scene.segments.forEach((segment, index) => {
    if (scene.isOn(segment)) bytes.set([...segment.color, 255], 4 * (index + 1));
  });
  return new Uint32Array(bytes.buffer);
}

/** The pixels on each side of a border that its outline takes: as `maskfirst predict` does. */
const reachOf = (width, height) => Math.max(1, Math.round(Math.max(width, height) / 600));

/** Fills and outlines as two pictures, of rows `top`..`bottom` - 1 of a width x height view. `ids`: from row `above` on. */
function layersOf(ids, above, words, width, height, top = 0, bottom = height) {
  const reach = reachOf(width, height);
  const fills = new ImageData(width, bottom - top);
  const outlines = new ImageData(width, bottom - top);
  const fillWords = new Uint32Array(fills.data.buffer);
  const outlineWords = new Uint32Array(outlines.data.buffer);
  const step = reach * width;
  for (let y = top, to = 0; y < bottom; y++) {
    let from = (y - above) * width;
    for (let x = 0; x < width; x++, from++, to++) {
      const id = ids[from];
      if (!words[id]) continue;
      fillWords[to] = words[id];
      if (
        (x >= reach && ids[from - reach] !== id) ||
        (x + reach < width && ids[from + reach] !== id) ||
        (y >= reach && ids[from - step] !== id) ||
        (y + reach < height && ids[from + step] !== id)
      ) {
        outlineWords[to] = words[id];
      }
    }
  }
  return [fills, outlines];
}

/** What is shown: the picture below, fills and outlines kept apart so that their opacity changes without painting anew. */
export class View {
  constructor(canvas) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.ground = null;
    this.layers = null;
    this.seen = null; // what was sampled of a scene last
  }

  /** Shows the picture alone; it is released. */
  setPicture(bitmap, width, height) {
    [this.canvas.width, this.canvas.height] = shownSize(width, height);
    this.ground = groundOf(bitmap, this.canvas.width, this.canvas.height);
    bitmap?.close();
    this.clear();
  }

  setScene(scene) {
    const { width, height } = this.canvas;
    if (this.seen?.scene !== scene || this.seen.changes !== scene.changes) {
      this.seen = { scene, changes: scene.changes, ids: sampled(scene, width, height, 0, height) };
    }
    this.layers = layersOf(this.seen.ids, 0, wordsOf(scene), width, height).map((pixels) => {
      const layer = canvasOf(width, height);
      layer.getContext("2d").putImageData(pixels, 0, 0);
      return layer;
    });
  }

  /** Leaves the picture alone. */
  clear() {
    this.layers = this.seen = null;
    if (this.ground) this.context.drawImage(this.ground, 0, 0);
  }

  compose(opacity, outlined) {
    if (!this.layers) return;
    this.context.drawImage(this.ground, 0, 0);
    const [fills, outlines] = this.layers;
    this.context.globalAlpha = opacity;
    this.context.drawImage(fills, 0, 0);
    this.context.globalAlpha = 1;
    if (outlined) this.context.drawImage(outlines, 0, 0);
  }
}

/** The overlay in the picture's own size, as a PNG; null where it is too large for the browser. */
export async function overlayPng(file, scene, opacity, outlined) {
  const { width, height } = scene;
  let bitmap = await bitmapOf(file);
  if (bitmap && (bitmap.width !== width || bitmap.height !== height)) {
    bitmap.close();
    bitmap = null;
  }
  const canvas = groundOf(bitmap, width, height);
  bitmap?.close();
  const context = canvas.getContext("2d");
  const words = wordsOf(scene);
  const reach = reachOf(width, height);
  const rows = Math.max(1, Math.floor(BAND / width));
  const band = canvasOf(width, Math.min(rows, height));
  for (let top = 0; top < height; top += rows) {
    const bottom = Math.min(height, top + rows);
    const above = Math.max(0, top - reach);
    const ids = sampled(scene, width, height, above, Math.min(height, bottom + reach));
    const [fills, outlines] = layersOf(ids, above, words, width, height, top, bottom);
    const shown = [[fills, opacity]];
    if (outlined) shown.push([outlines, 1]);
    for (const [pixels, alpha] of shown) {
      band.getContext("2d").putImageData(pixels, 0, 0); // takes the place of what was there, transparent pixels too
      context.globalAlpha = alpha;
      context.drawImage(band, 0, 0, width, bottom - top, 0, top, width, bottom - top);
    }
    await new Promise((resolve) => setTimeout(resolve)); // lets the page go on
  }
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
