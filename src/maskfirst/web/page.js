/* The page: a picture goes to the server, its segments come back and are looked at. */

import { cocoOf } from "./coco.js";
import { View, bitmapOf, overlayPng } from "./draw.js";
import { Scene } from "./scene.js";
import { ServerError, ask, hasKey, setKey } from "./server.js";

const $ = (id) => document.getElementById(id);
const canvas = $("canvas");
const view = new View(canvas);
const LARGEST_ZOOM = 4; // screen pixels (CSS) for one of a small picture
const COARSE_ZOOM = 2; // from which pixels are shown as squares
const LIKELIEST = 5;
const LEAST = 0.1; // of the scores of instances that are asked for; those above can be shown without asking again
const TOLD_AFTER = 200; // ms without a key, before the name below the crosshair is told

let model = null; // the answer of /model
let file = null;
let scene = null;
let running = null; // AbortController of the request for segments
let asking = null; // AbortController of the request for a point's names
let retry = null; // what "Try again" does
let cross = null; // [x, y] of the crosshair
let pointed = null; // [x, y] of the pointer over the picture
let clock = 0;
let telling = 0;
let redrawing = 0;

/* Texts */

const percent = new Intl.NumberFormat("en", { style: "percent", maximumFractionDigits: 0 });
const finer = new Intl.NumberFormat("en", { style: "percent", minimumFractionDigits: 1, maximumFractionDigits: 1 });
const number = new Intl.NumberFormat("en");

const shareText = (share) => (share > 0 && share < 0.001 ? "<0.1%" : finer.format(share));
const counted = (count, one, many) => `${number.format(count)} ${count === 1 ? one : many}`;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

/** An element with a class and children; texts never become markup. */
function element(tag, name = "", ...children) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...children);
  return made;
}

function swatch(color) {
  const made = element("span", "swatch");
  made.style.backgroundColor = `rgb(${color.join(" ")})`;
  return made;
}

// Scores of the semantic task are means over pixels, and in some models no probabilities.
const scored = (segment) => scene.task !== "semantic" || segment.score < 1;

/* States */

function wait(text) {
  clearInterval(clock);
  const since = performance.now();
  const tick = () => {
    $("elapsed").textContent = `${Math.floor((performance.now() - since) / 1000)} s`;
  };
  tick();
  clock = setInterval(tick, 1000);
  $("status").textContent = text;
  $("progress").hidden = $("cancel").hidden = false;
  $("again").hidden = $("error").hidden = true;
}

function rest(text = "") {
  clearInterval(clock);
  $("elapsed").textContent = "";
  $("status").textContent = text;
  $("progress").hidden = $("cancel").hidden = true;
}

/** What `ask` tells of its waits, in the place of a text that comes back afterwards. */
function busyIn(id) {
  return (seconds, again, most) => {
    const before = $(id).textContent;
    $(id).textContent = `The server is busy, next try in ${Math.ceil(seconds)} s (${again} of ${most})`;
    return () => {
      $(id).textContent = before;
    };
  };
}

// Statuses of requests that would be refused again.
const isLasting = (status) => status >= 400 && status < 500 && ![408, 429].includes(status);

/** One line; `action` is what may be tried again. */
function fail(error, action) {
  rest();
  retry = action;
  if (error.status === 401) {
    $("key-label").textContent = hasKey() ? "The server did not take this API key" : "This server asks for an API key";
    $("key").hidden = false;
    $("key-field").focus();
    return;
  }
  const known = error instanceof ServerError;
  const text = known ? capital(error.message) : `The answer cannot be shown: ${error.message}`;
  $("error").textContent = error.id ? `${text} (request ${error.id})` : text;
  $("error").hidden = false;
  $("again").hidden = isLasting(error.status);
}

/* The model */

let connecting = false;

async function connect() {
  if (connecting) return;
  connecting = true;
  wait("Asking the server for its model");
  $("cancel").hidden = true;
  try {
    model = await ask("model", { waiting: busyIn("status") });
  } catch (error) {
    fail(error, connect);
    return;
  } finally {
    connecting = false;
  }
  rest();
  const { names } = model.vocabulary;
  const tasks = model.tasks.length > 1 ? "" : `${model.task}, `;
  $("model").replaceChildren(element("bdi", "", model.name), `, ${tasks}${counted(names.length, "class", "classes")}`);
  const [megabytes, megapixels] = [model.limits.bytes, model.limits.pixels].map((most) => number.format(most / 1e6));
  $("limit").textContent = `, up to ${megabytes} MB and ${megapixels} megapixels`;
  for (const task of model.tasks) {
    const radio = element("input");
    radio.type = "radio";
    radio.name = "task";
    radio.value = task;
    radio.checked = task === model.task;
    radio.addEventListener("change", () => file && segment());
    $("tasks").append(element("label", "", radio, capital(task)));
  }
  $("least").min = 100 * LEAST;
  $("tasks").hidden = model.tasks.length < 2;
  if (file) segment();
}

const chosenTask = () => document.querySelector("#tasks input:checked")?.value ?? model.task;

/* A picture */

function forget() {
  scene = cross = pointed = null;
  asking?.abort();
  $("points-names").replaceChildren();
  $("panel").hidden = $("points").hidden = $("cross").hidden = $("tip").hidden = true;
  $("readout").replaceChildren();
  $("told").textContent = "";
  $("hint").hidden = true;
}

async function open(given) {
  running?.abort();
  forget();
  file = given;
  const chosen = $("drop").contains(document.activeElement);
  $("drop").hidden = true;
  $("another").hidden = false;
  if (chosen) refocus();
  $("work").hidden = true;
  $("file").replaceChildren(element("bdi", "", file.name));
  await (model ? segment() : connect());
}

function showPicture(bitmap, width, height) {
  view.setPicture(bitmap, width, height);
  $("frame").style.setProperty("--ratio", width / height);
  $("frame").style.setProperty("--most", `${LARGEST_ZOOM * width}px`);
  $("work").hidden = false;
  setSharpness(width);
}

function setSharpness(width) {
  canvas.classList.toggle("coarse", canvas.clientWidth >= COARSE_ZOOM * width);
}

async function segment() {
  running?.abort();
  running = new AbortController();
  const { signal } = running;
  const asked = file;
  const task = chosenTask();
  forget();
  view.clear();
  wait(`Segmenting ${asked.name}`);
  const start = performance.now();
  try {
    if (asked.size > model.limits.bytes) {
      const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
      const text = `The file has ${megabytes(asked.size)} MB, and this server takes up to ${megabytes(model.limits.bytes)} MB`;
      throw new ServerError(text, { status: 413 });
    }
    // A folder, or a file that is gone, would look like a server that is.
    await asked.slice(0, 1).arrayBuffer().catch(() => {
      throw new ServerError("The file cannot be read");
    });
    const least = task === "instance" ? `&least_score=${LEAST}` : "";
    const answer = ask(`predict?task=${encodeURIComponent(task)}${least}`, { body: asked, signal, waiting: busyIn("status") });
    answer.catch(() => {}); // it is awaited below
    const bitmap = await bitmapOf(asked);
    if (signal.aborted) {
      bitmap?.close();
      return;
    }
    const size = bitmap && [bitmap.width, bitmap.height];
    if (bitmap) showPicture(bitmap, ...size);
    const found = await answer;
    signal.throwIfAborted();
    const drawable = size?.[0] === found.width && size[1] === found.height;
    if (!drawable) showPicture(null, found.width, found.height);
    scene = new Scene(found, model.vocabulary, found.task === "instance" ? $("least").value / 100 : 0);
    showScene(drawable);
    const seconds = ((performance.now() - start) / 1000).toFixed(1);
    rest(`${capital(summary())} in ${seconds} s`);
    $("elapsed").textContent = "";
  } catch (error) {
    if (!signal.aborted) fail(error, segment);
  } finally {
    if (running?.signal === signal) running = null;
  }
}

function summary() {
  const sure = scene.sure();
  if (!sure.length) return "nothing was found";
  const classes = counted(new Set(sure.map((one) => one.index)).size, "class", "classes");
  return scene.task === "semantic" ? classes : `${counted(sure.length, "segment", "segments")} of ${classes}`;
}

function showScene(drawable) {
  const { width, height, task } = scene;
  $("file").replaceChildren(element("bdi", "", file.name), `, ${width} × ${height} px`);
  $("grey").hidden = drawable;
  $("hint-points").hidden = !model.points;
  $("hint").hidden = false;
  canvas.setAttribute("aria-label", `${file.name}, ${summary()}`);
  $("least-row").hidden = task !== "instance";
  showClasses();
  redraw();
  $("panel").hidden = false;
}

function showClasses() {
  const rows = scene.classes();
  $("classes").replaceChildren(
    ...rows.map(({ index, count, share }) => {
      const name = model.vocabulary.names[index];
      const box = element("input");
      box.type = "checkbox";
      box.checked = !scene.hidden.has(index);
      box.setAttribute("aria-label", `${name}, ${counted(count, "segment", "segments")}, ${shareText(share)}`);
      box.addEventListener("change", () => {
        const hidden = new Set(scene.hidden);
        if (box.checked) hidden.delete(index);
        else hidden.add(index);
        hide(hidden);
      });
      const row = element(
        "li",
        "",
        element(
          "label",
          "",
          element("span", "name", box, swatch(model.vocabulary.colors[index]), element("bdi", "", name)),
          element("span", "count", number.format(count)),
          element("span", "share", shareText(share)),
        ),
      );
      row.dataset.index = index;
      return row;
    }),
  );
  const without = 1 - rows.reduce((sum, row) => sum + row.share, 0);
  $("rest").textContent = without > 0.0005 ? `Without a name: ${shareText(without)}` : "";
}

function hide(indices) {
  scene.setHidden(indices);
  redraw();
  read();
}

function redraw() {
  view.setScene(scene);
  compose();
}

const compose = () => view.compose($("opacity").value / 100, $("outlined").checked);

function switchAll(shown) {
  for (const box of document.querySelectorAll("#classes input")) box.checked = shown;
  hide(shown ? [] : scene.segments.map((one) => one.index));
}

/* What lies under the pointer or the crosshair */

function under([x, y]) {
  const found = scene.at(x, y);
  if (!found) return { name: "No segment", score: "" };
  return { found, name: model.vocabulary.names[found.index], score: scored(found) ? percent.format(found.score) : "" };
}

/** Writes down what is under the pointer, or else under the crosshair. */
function read() {
  const place = pointed ?? cross;
  for (const row of document.querySelectorAll("#classes .under")) row.classList.remove("under");
  $("tip").hidden = !pointed;
  if (!place) {
    $("readout").replaceChildren();
    return;
  }
  const { found, name, score } = under(place);
  const parts = [element("bdi", "name", name)];
  if (score) parts.push(element("span", "score", score));
  if (pointed) $("tip").replaceChildren(element("bdi", "", name), score && ` ${score}`);
  if (found) {
    document.querySelector(`#classes [data-index="${found.index}"]`)?.classList.add("under");
    parts.unshift(swatch(found.color));
  }
  $("readout").replaceChildren(...parts, element("span", "place", `x ${place[0]}, y ${place[1]}`));
}

const clamp = (value, size) => Math.max(0, Math.min(size - 1, value));

function placeOf(event) {
  const { left, top, width, height } = canvas.getBoundingClientRect();
  return [
    clamp(Math.floor(((event.clientX - left) / width) * scene.width), scene.width),
    clamp(Math.floor(((event.clientY - top) / height) * scene.height), scene.height),
  ];
}

function moveTip(event) {
  const { left, top, width, height } = canvas.getBoundingClientRect();
  const [x, y] = [event.clientX - left, event.clientY - top];
  $("tip").style.left = `${x}px`;
  $("tip").style.top = `${y}px`;
  $("tip").classList.toggle("left", x > width / 2);
  $("tip").classList.toggle("up", y > height / 2);
}

function moveCross(x, y) {
  cross = [clamp(x, scene.width), clamp(y, scene.height)];
  $("cross").hidden = false;
  $("cross").style.left = `${(100 * (cross[0] + 0.5)) / scene.width}%`;
  $("cross").style.top = `${(100 * (cross[1] + 0.5)) / scene.height}%`;
}

function tell() {
  clearTimeout(telling);
  telling = setTimeout(() => {
    if (!scene || !cross) return;
    const { name, score } = under(cross);
    $("told").textContent = [name, score, `x ${cross[0]}, y ${cross[1]}`].filter(Boolean).join(", ");
  }, TOLD_AFTER);
}

/* The names of a point */

async function namePoint() {
  if (!model.points) return;
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  const [x, y] = cross;
  $("points").hidden = false;
  $("points").setAttribute("aria-busy", "true");
  $("points-at").textContent = `x ${x}, y ${y}: asking the server`;
  $("error").hidden = $("again").hidden = true;
  try {
    const answer = await ask(`points?at=${y},${x}`, { body: file, signal, waiting: busyIn("points-at") });
    signal.throwIfAborted();
    const likeliest = answer.points[0].probabilities
      .map((probability, index) => ({ probability, name: answer.names[index] }))
      .sort((one, other) => other.probability - one.probability)
      .slice(0, LIKELIEST);
    $("points-at").textContent = `x ${x}, y ${y}`;
    $("points-names").replaceChildren(
      ...likeliest.map(({ probability, name }) => {
        const bar = element("span");
        bar.style.width = `${100 * Math.min(1, probability)}%`;
        const share = element("span", "", finer.format(probability));
        return element("li", "", element("bdi", "", name), share, element("div", "track", bar));
      }),
    );
  } catch (error) {
    if (signal.aborted) return;
    $("points").hidden = true;
    fail(error, namePoint);
  } finally {
    if (asking?.signal === signal) $("points").removeAttribute("aria-busy");
  }
}

/* Files to save */

const stem = () => file.name.replace(/\.[^.]*$/, "") || "picture";

function save(blob, name) {
  const link = element("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function savePng() {
  $("save-png").disabled = true;
  const name = `${stem()}-${scene.task}.png`;
  try {
    const png = await overlayPng(file, scene, $("opacity").value / 100, $("outlined").checked);
    if (!png) throw new ServerError("This picture is too large for the browser to write");
    save(png, name);
  } catch (error) {
    fail(error, savePng);
  } finally {
    $("save-png").disabled = false;
  }
}

function saveCoco() {
  const text = JSON.stringify(cocoOf(file.name, scene, model.vocabulary));
  save(new Blob([text], { type: "application/json" }), `${stem()}-${scene.task}.json`);
}

/* Events */

const choose = () => $("input").click();
$("choose").addEventListener("click", choose);
$("another").addEventListener("click", choose);
$("input").addEventListener("change", () => {
  const [given] = $("input").files;
  if (given) open(given);
  $("input").value = ""; // so that the same file may be chosen again
});

document.addEventListener("paste", (event) => {
  const [given] = event.clipboardData.files;
  if (!given) return;
  event.preventDefault();
  open(given);
});

/** Where what had the focus is gone. */
function refocus() {
  (file ? $("another") : $("choose")).focus();
}

const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
let entered = 0;
document.addEventListener("dragenter", (event) => {
  if (!holdsFiles(event)) return;
  entered += 1;
  document.body.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!holdsFiles(event)) return;
  entered -= 1;
  if (entered <= 0) document.body.classList.remove("over");
});
document.addEventListener("dragover", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  event.dataTransfer.dropEffect = "copy";
});
document.addEventListener("drop", (event) => {
  if (!holdsFiles(event)) return;
  event.preventDefault();
  entered = 0;
  document.body.classList.remove("over");
  const [given] = event.dataTransfer.files;
  if (given) open(given);
});

$("key").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey($("key-field").value);
  $("key-field").value = "";
  $("key").hidden = true;
  refocus();
  retry();
});
$("again").addEventListener("click", () => {
  $("again").hidden = true;
  refocus();
  retry();
});
$("cancel").addEventListener("click", () => {
  running?.abort();
  rest("Stopped");
  retry = segment;
  $("again").hidden = false;
  $("again").focus();
});

$("opacity").addEventListener("input", () => {
  $("opacity-value").textContent = `${$("opacity").value}%`;
  compose();
});
$("outlined").addEventListener("change", compose);
$("least").addEventListener("input", () => {
  $("least-value").textContent = `${$("least").value}%`;
  cancelAnimationFrame(redrawing);
  redrawing = requestAnimationFrame(() => {
    if (!scene) return;
    scene.setLeastScore($("least").value / 100);
    showClasses();
    redraw();
    read();
    rest(capital(summary()));
  });
});
$("all").addEventListener("click", () => switchAll(true));
$("none").addEventListener("click", () => switchAll(false));
$("save-png").addEventListener("click", savePng);
$("save-coco").addEventListener("click", saveCoco);

canvas.addEventListener("pointermove", (event) => {
  if (!scene || event.pointerType === "touch") return;
  pointed = placeOf(event);
  moveTip(event);
  read();
});
canvas.addEventListener("pointerleave", () => {
  pointed = null;
  if (scene) read();
});
canvas.addEventListener("click", (event) => {
  if (!scene) return;
  moveCross(...placeOf(event));
  read();
  tell();
  namePoint();
});
canvas.addEventListener("focus", () => {
  // A click comes with a place of its own.
  if (!scene || cross || !canvas.matches(":focus-visible")) return;
  moveCross(Math.floor(scene.width / 2), Math.floor(scene.height / 2));
  read();
  tell();
});
const STEPS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
canvas.addEventListener("keydown", (event) => {
  if (!scene || event.altKey || event.ctrlKey || event.metaKey) return;
  const step = STEPS[event.key];
  if (!step && event.key !== "Enter") return;
  event.preventDefault();
  const [x, y] = cross ?? [Math.floor(scene.width / 2), Math.floor(scene.height / 2)];
  const pixels = event.shiftKey ? 10 : 1;
  pointed = null;
  moveCross(x + (step ? pixels * step[0] : 0), y + (step ? pixels * step[1] : 0));
  read();
  if (step) tell();
  else if (!event.repeat) namePoint();
});
new ResizeObserver(() => scene && setSharpness(scene.width)).observe(canvas);

connect();
