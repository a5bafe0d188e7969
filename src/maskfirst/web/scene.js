/* What was found in a picture: the segment on top at every pixel, its colour, and its share of the picture. */

import { areaOf, fill, runsOf } from "./rle.js";

// Share of white (above 0) or of black (below) mixed into the colour of the 1st, 2nd, ... segment of a class: draw.TINTS.
const TINTS = [0, 0.35, -0.3, 0.6, -0.5];

function tinted(color, tint) {
  return color.map((value) => Math.round(value + ((tint > 0 ? 255 : 0) - value) * Math.abs(tint)));
}

export class Scene {
  /** `found`: the answer of /predict. `vocabulary`: of /model. Segments below `leastScore` are left out. */
  constructor(found, vocabulary, leastScore = 0) {
    this.height = found.height;
    this.width = found.width;
    this.task = found.task;
    this.hidden = new Set(); // indices of classes that are switched off
    this.leastScore = leastScore;
    const seen = new Map();
    this.segments = found.segments.map((segment) => {
      const [height, width] = segment.rle.size;
      if (height !== this.height || width !== this.width) throw new RangeError("run lengths of another size");
      const runs = runsOf(segment.rle);
      const nth = seen.get(segment.index) ?? 0;
      seen.set(segment.index, nth + 1);
      const color = tinted(vocabulary.colors[segment.index], TINTS[nth % TINTS.length]);
      return { ...segment, runs, area: areaOf(runs), color };
    });
    // Column by column, as the runs are, so that filling is one copy of memory a run; 0 is none, n is segments[n - 1].
    const Numbers = this.segments.length < 65535 ? Uint16Array : Uint32Array;
    this.map = new Numbers(this.height * this.width);
    // Instances overlap, and the smaller one is in front, as in `maskfirst predict`.
    this.order = [...this.segments.keys()];
    if (this.task === "instance") this.order.sort((one, other) => this.segments[other].area - this.segments[one].area);
    this.changes = 0; // of the map
    this.fillMap((segment) => this.isSure(segment));
  }

  setLeastScore(score) {
    this.leastScore = score;
    this.fillMap((segment) => this.isSure(segment) && this.isOn(segment));
  }

  /** Which classes are switched off. */
  setHidden(indices) {
    this.hidden = new Set(indices);
    // Below an instance others may lie; in the other tasks hidden segments may stay in the map.
    if (this.task === "instance") this.fillMap((segment) => this.isSure(segment) && this.isOn(segment));
  }

  isSure(segment) {
    return segment.score >= this.leastScore;
  }

  isOn(segment) {
    return !this.hidden.has(segment.index);
  }

  sure() {
    return this.segments.filter((segment) => this.isSure(segment));
  }

  fillMap(chosen) {
    this.changes += 1;
    this.map.fill(0);
    for (const index of this.order) {
      if (chosen(this.segments[index])) fill(this.map, this.segments[index].runs, index + 1);
    }
  }

  /** The segment that is seen at a pixel, or undefined. */
  at(x, y) {
    const segment = this.segments[this.map[x * this.height + y] - 1];
    return segment && this.isOn(segment) ? segment : undefined;
  }

  /** The pixels of each segment that smaller ones leave it, were all classes shown. */
  frontAreas() {
    if (this.task !== "instance") return this.segments.map((segment) => segment.area); // which have no pixel in common
    if (this.hidden.size) this.fillMap((segment) => this.isSure(segment));
    const { map } = this;
    const areas = new Uint32Array(this.segments.length + 1);
    for (let at = 0; at < map.length; at++) areas[map[at]]++;
    if (this.hidden.size) this.fillMap((segment) => this.isSure(segment) && this.isOn(segment));
    return areas.subarray(1);
  }

  /** [{index, count, share}], the largest first, of all classes whether hidden or not; `share` counts what is in front. */
  classes() {
    const areas = this.frontAreas();
    const rows = new Map();
    this.segments.forEach((segment, index) => {
      if (!this.isSure(segment)) return;
      const row = rows.get(segment.index) ?? { index: segment.index, count: 0, share: 0 };
      rows.set(segment.index, row);
      row.count += 1;
      row.share += areas[index] / this.map.length;
    });
    return [...rows.values()].sort((one, other) => other.share - one.share);
  }
}
