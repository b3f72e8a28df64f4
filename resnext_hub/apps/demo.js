// The page of a model: decodes an image, runs model.onnx on its pixels with ONNX Runtime Web, and shows the answer.
"use strict";

const element = (id) => document.getElementById(id);
const percent = (value) => `${(100 * value).toFixed(1)} %`;

/** What the page knows about the model: names, thresholds, limits. */
let facts;
/** The loaded model, or null after a failure: the next image loads it again. */
let session = null;
let ort;
/** Only the answer for the last image is shown. */
let latest = 0;
/** The runtime takes one image at a time. */
let queue = Promise.resolve();

start();

async function start() {
  if (location.protocol === "file:") {
    return say("This page was opened as a file, but browsers do not run models from local files. In its folder, run "
      + "“python -m http.server”, and open the address that it prints.");
  }
  const input = element("file");
  const drop = element("drop");
  drop.classList.add("off");
  input.disabled = true;
  say("Loading the model…");
  try {
    const answer = await fetch("labels.json");
    if (!answer.ok) throw new Error(`labels.json: ${answer.status} ${answer.statusText}`);
    facts = await answer.json();
    ort = await import("./onnxruntime-web/ort.js");
    ort.env.wasm.numThreads = 1; // more need headers that static servers do not send
    ort.env.wasm.proxy = true; // in a worker, so that the page stays responsive
    ort.env.wasm.wasmPaths = { wasm: new URL("onnxruntime-web/ort-wasm-simd-threaded.wasm", location.href).href };
    await load();
  } catch (error) {
    return say(`The model cannot be loaded: ${reason(error)}`);
  }
  drop.classList.remove("off");
  input.disabled = false;
  say("");
  input.addEventListener("change", () => {
    if (input.files.length) classify(input.files[0]);
    input.value = ""; // so that the same file can be chosen again
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  document.addEventListener("dragleave", () => drop.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    if (event.dataTransfer.files.length) classify(event.dataTransfer.files[0]);
  });
}

async function load() {
  session ??= await ort.InferenceSession.create("model.onnx", { executionProviders: ["wasm"] });
}

async function classify(file) {
  const number = ++latest;
  element("answer").hidden = true;
  say("Classifying…");
  queue = queue.then(() => run(file)).then(
    (answer) => number === latest && show(...answer, file),
    (error) => number === latest && say(`This file cannot be classified: ${reason(error)}`),
  );
}

/** Return the probabilities of an image file, whether it is unlike the training images, and the seconds that it took. */
async function run(file) {
  const begin = performance.now();
  const { pixels, width, height } = await decode(file);
  try {
    await load();
    const images = new ort.Tensor("uint8", pixels, [1, height, width, 3]);
    const found = await session.run({ images });
    const unlike = found.ood_score?.data[0] > 0;
    return [found.probabilities.data, unlike, (performance.now() - begin) / 1000];
  } catch (error) {
    session = null; // after running out of memory, it would fail again
    throw error;
  }
}

/** Return the RGB pixels of an image, upright, in the colors of the file; transparency is ignored, as in training. */
async function decode(file) {
  let bitmap;
  try {
    const as = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
    bitmap = await createImageBitmap(file, as);
  } catch {
    throw new Error("it is not an image that this browser can decode");
  }
  const { width, height } = bitmap;
  if (width * height > facts.max_pixels) {
    throw new Error(`${width} x ${height} is more than ${facts.max_pixels} pixels`);
  }
  if (Math.max(width, height) > facts.max_aspect * Math.min(width, height)) {
    throw new Error(`${width} x ${height} pixels: one side is more than ${facts.max_aspect} times the other`);
  }
  let rgba = onCanvas(bitmap);
  for (let i = 3; i < rgba.length; i += 4) {
    if (rgba[i] !== 255) {
      rgba = onGraphics(bitmap) ?? rgba;
      break;
    }
  }
  bitmap.close();
  const pixels = new Uint8Array(3 * width * height);
  for (let from = 0, to = 0; to < pixels.length; from += 4, to += 3) {
    pixels[to] = rgba[from];
    pixels[to + 1] = rgba[from + 1];
    pixels[to + 2] = rgba[from + 2];
  }
  return { pixels, width, height };
}

/** Return the RGBA pixels of an opaque image; a canvas loses the colors of transparent ones. */
function onCanvas(bitmap) {
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, bitmap.width, bitmap.height).data;
}

/** Return the RGBA pixels of an image with transparency, or null if WebGL is missing or the image is too large for it. */
function onGraphics(bitmap) {
  const { width, height } = bitmap;
  const gl = new OffscreenCanvas(1, 1).getContext("webgl2");
  if (gl === null || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
  const pixels = new Uint8Array(4 * width * height);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, pixels);
  const failed = gl.getError() !== gl.NO_ERROR;
  gl.getExtension("WEBGL_lose_context")?.loseContext();
  return failed ? null : pixels;
}

function show(probabilities, unlike, seconds, file) {
  const several = facts.thresholds !== null;
  const order = Array.from(probabilities.keys()).sort((a, b) => probabilities[b] - probabilities[a] || a - b);
  const unsure = !several && probabilities[order[0]] < facts.unsure_below;
  const predicted = several ? order.filter((index) => probabilities[index] >= facts.thresholds[index]) : [order[0]];
  const names = predicted.map((index) => facts.label_names[index]).join(", ");
  const verdict = document.createElement("b");
  verdict.textContent = unsure ? "Unsure" : names || "None of the labels";
  element("verdict").replaceChildren(verdict);
  element("remark").textContent = `The most probable class is ${names}, but answers with a probability this `
    + "low are wrong too often.";
  element("remark").hidden = !unsure;
  element("warning").hidden = !unlike;
  const bars = several ? order : order.slice(0, facts.most_classes);
  element("bars").replaceChildren(...bars.map((index) => bar(
    facts.label_names[index], probabilities[index], several ? facts.thresholds[index] : null,
    predicted.includes(index) && !unsure,
  )));
  element("legend").hidden = !several;
  const preview = element("preview");
  URL.revokeObjectURL(preview.src);
  preview.src = URL.createObjectURL(file);
  element("time").textContent = `${seconds.toFixed(2)} s in this browser`;
  say("");
  element("answer").hidden = false;
}

function bar(label, probability, threshold, predicted) {
  const item = document.createElement("li");
  item.classList.toggle("predicted", predicted);
  const from = threshold === null ? "" : `predicted at ${percent(threshold)} or higher`;
  const meter = part("div", "meter", "");
  for (const [name, value] of Object.entries({
    role: "meter", "aria-label": label, "aria-valuemin": 0, "aria-valuemax": 1, "aria-valuenow": probability,
    "aria-valuetext": from ? `${percent(probability)}, ${from}` : percent(probability),
  })) meter.setAttribute(name, value);
  const fill = part("div", "fill", "");
  fill.style.width = `${100 * probability}%`;
  meter.append(fill);
  if (from) {
    const mark = part("div", "threshold", "");
    mark.style.left = `${100 * threshold}%`;
    mark.title = from;
    meter.append(mark);
  }
  item.append(part("span", "name", label), part("span", "percent", percent(probability)), meter);
  return item;
}

function part(tag, name, text) {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

function say(text) {
  element("status").textContent = text;
}

function reason(error) {
  return String(error?.message ?? error).split("\n")[0].slice(0, 200);
}
