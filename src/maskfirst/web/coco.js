/* The answer of /predict as a file in COCO's form. */

/** Of the segments that are sure enough, with scores, as COCO's results have them. `image`: its file's name. */
export function cocoOf(image, scene, vocabulary) {
  const things = new Set(vocabulary.things);
  return {
    images: [{ id: 1, file_name: image, height: scene.height, width: scene.width }],
    annotations: scene.sure().map(({ box: [x0, y0, x1, y1], ...segment }, index) => ({
      id: index + 1,
      image_id: 1,
      category_id: segment.category_id,
      segmentation: segment.rle,
      area: segment.area,
      bbox: [x0, y0, x1 - x0, y1 - y0],
      iscrowd: 0,
      score: segment.score,
    })),
    categories: vocabulary.names.map((name, index) => ({
      id: vocabulary.ids[index],
      name,
      isthing: things.has(index) ? 1 : 0,
      color: vocabulary.colors[index],
    })),
  };
}
