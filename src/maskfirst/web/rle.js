/* COCO's run lengths: pixels column by column, runs of 0 and 1 in turn starting with 0, packed into text as pycocotools does.
   https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c, rleFrString */

// Pixels of a run for which a loop is quicker than a call.
const SHORT = 48;

/** The runs of {size: [height, width], counts: text}. Throws RangeError where they do not make up height x width pixels. */
export function runsOf({ size: [height, width], counts }) {
  const runs = new Uint32Array(counts.length); // every run takes one character or more
  let length = 0;
  let total = 0;
  for (let at = 0; at < counts.length; ) {
    let value = 0;
    let shift = 0;
    let character;
    do {
      character = counts.charCodeAt(at++) - 48;
      if (!(character >= 0 && character < 64) || shift > 30) throw new RangeError("damaged run lengths");
      value |= (character & 0x1f) << shift;
      shift += 5;
    } while (character & 0x20);
    if (character & 0x10 && shift < 32) value |= -1 << shift;
    if (length > 2) value += runs[length - 2];
    if (value < 0) throw new RangeError("damaged run lengths");
    runs[length++] = value;
    total += value;
  }
  if (total !== height * width) throw new RangeError("run lengths of another size");
  return runs.slice(0, length);
}

/** The number of pixels in the mask. */
export function areaOf(runs) {
  let area = 0;
  for (let index = 1; index < runs.length; index += 2) area += runs[index];
  return area;
}

/** Writes `value` where the mask is into `map`, which holds the pixels column by column. */
export function fill(map, runs, value) {
  let at = 0;
  for (let index = 0; index < runs.length; index++) {
    const end = at + runs[index];
    if (index & 1) {
      if (end - at > SHORT) map.fill(value, at, end);
      else for (let each = at; each < end; each++) map[each] = value;
    }
    at = end;
  }
}

/** The mask as bytes 0 and 1, column by column. */
export function decode(rle) {
  const mask = new Uint8Array(rle.size[0] * rle.size[1]);
  fill(mask, runsOf(rle), 1);
  return mask;
}
