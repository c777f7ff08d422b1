// The page: image, class names and sliders in; drawings, a legend and downloads out.

import {chooseRuntime, Segmenter} from './segmenter.js';

const $ = id => document.getElementById(id);
const GROUP_COLOURS = Array.from({length: 64}, (_, i) => hsl(i * 137.508, 65, i % 2 ? 45 : 62));
const MOST_PIXELS = 1024;  // of the longer side; larger images are shown and labelled at this size

let segmenter, encoded, found, name = 'image';

function hsl(hue, saturation, lightness) {
  const canvas = new OffscreenCanvas(1, 1), context = canvas.getContext('2d');
  context.fillStyle = `hsl(${hue % 360} ${saturation}% ${lightness}%)`;
  context.fillRect(0, 0, 1, 1);
  return [...context.getImageData(0, 0, 1, 1).data.slice(0, 3)];
}

function say(text, isError = false) {
  $('status').textContent = text;
  $('status').classList.toggle('error', isError);
}

// One task at a time; of those that wait, the last.
let running = false, waiting = null;
async function enqueue(task) {
  if (running) {
    waiting = task;
    return;
  }
  running = true;
  await task().catch(error => say(error.message, true));
  running = false;
  const next = waiting;
  waiting = null;
  if (next) enqueue(next);
}

async function open(file, label) {
  const bitmap = await createImageBitmap(file).catch(() => null);
  if (!bitmap) return say(`${label} is no image that this browser can read.`, true);
  const scale = Math.min(1, MOST_PIXELS / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map(side => Math.max(1, Math.round(side * scale)));
  const context = new OffscreenCanvas(width, height).getContext('2d');
  context.drawImage(bitmap, 0, 0, width, height);
  name = label.replace(/\.\w+$/, '');
  const image = context.getImageData(0, 0, width, height);
  draw($('input'), image, () => null);
  enqueue(async () => {
    say('Encoding …');
    const start = performance.now();
    encoded = await segmenter.encode(image);
    drawGroups();
    await segment();
    say(`${width} × ${height} px, encoded and segmented in ${Math.round(performance.now() - start)} ms.`);
  });
}

function openFirst(files) {
  if (files.length) open(files[0], files[0].name);
}

async function segment() {
  const names = $('names').value.split(',').map(each => each.trim()).filter(each => each);
  if (!encoded) return;
  if (!names.length) {
    found = null;
    $('legend').replaceChildren();
    draw($('segments'), encoded.image, () => null);
    return;
  }
  const threshold = Number($('threshold').value);
  const {labels, scores} = await segmenter.segment(encoded, names, threshold);
  const classes = [...(threshold > 0 ? ['background'] : []), ...names.map(each => each.split('|')[0].trim())];
  found = {labels, scores, classes, background: threshold > 0};
  drawSegments();
  showLegend();
}

function colour(label) {
  const known = segmenter.bundle.palette[found.classes[label]];
  return found.background && label === 0 ? null : known ?? GROUP_COLOURS[label];
}

function drawSegments() {
  if (found) draw($('segments'), encoded.image, pixel => colour(found.labels[pixel]));
}

function drawGroups() {
  if (!encoded) return;
  const stage = encoded.groups[Number($('stage').value) - 1], side = segmenter.bundle.window;
  const {width, height} = encoded.image;
  draw($('groups'), encoded.image, pixel => {
    const y = Math.floor(((Math.floor(pixel / width) + 0.5) * side) / height);
    const x = Math.floor((((pixel % width) + 0.5) * side) / width);
    return GROUP_COLOURS[stage[y * side + x]];
  });
}

// An image under the colours of its pixels.
function draw(canvas, image, colourOf) {
  if (!image) return;
  canvas.width = image.width;
  canvas.height = image.height;
  const opacity = Number($('opacity').value), data = new Uint8ClampedArray(image.data);
  for (let pixel = 0; pixel < image.width * image.height; pixel++) {
    const tint = colourOf(pixel);
    if (!tint) continue;
    for (let c = 0; c < 3; c++) data[4 * pixel + c] = (1 - opacity) * data[4 * pixel + c] + opacity * tint[c];
  }
  canvas.getContext('2d').putImageData(new ImageData(data, image.width, image.height), 0, 0);
}

function areas() {
  const counts = new Array(found.classes.length).fill(0);
  for (const label of found.labels) counts[label]++;
  const rows = counts.map((pixels, label) => {
    const score = found.background && label === 0 ? null : found.scores[label];
    return {label, name: found.classes[label], area: pixels / found.labels.length, pixels, score};
  });
  return rows.sort((a, b) => b.area - a.area);
}

function showLegend() {
  const rows = areas(), absent = rows.filter(row => !row.pixels).map(row => row.name);
  $('legend').replaceChildren(...rows.filter(row => row.pixels).map(row => {
    const line = document.createElement('tr'), tint = colour(row.label);
    const swatch = document.createElement('i');
    swatch.style.background = tint ? `rgb(${tint})` : 'transparent';
    const cells = [row.name, `${(100 * row.area).toFixed(1)} %`, row.score === null ? '' : row.score.toFixed(2)];
    line.append(...cells.map(text => Object.assign(document.createElement('td'), {textContent: text})));
    line.firstChild.prepend(swatch);
    return line;
  }));
  $('absent').textContent = absent.length ? `not found: ${absent.join(', ')}` : '';
}

function save(blob, file) {
  const link = Object.assign(document.createElement('a'), {href: URL.createObjectURL(blob), download: file});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function saveMask() {
  if (!found) return;
  const {width, height} = encoded.image, data = new ImageData(width, height);
  const canvas = new OffscreenCanvas(width, height);
  found.labels.forEach((label, pixel) => data.data.set([label, label, label, 255], 4 * pixel));
  canvas.getContext('2d').putImageData(data, 0, 0);
  canvas.convertToBlob().then(blob => save(blob, `${name}_mask.png`));
}

function saveJson() {
  if (!found) return;
  const {width, height} = encoded.image;
  save(new Blob([JSON.stringify({picture: name, height, width, classes: areas()}, null, 2)]), `${name}.json`);
}

async function useCamera() {
  const stream = await navigator.mediaDevices.getUserMedia({video: true});
  const video = Object.assign(document.createElement('video'), {srcObject: stream, muted: true});
  await video.play();
  const bitmap = await createImageBitmap(video);
  stream.getTracks().forEach(track => track.stop());
  open(bitmap, 'camera');
}

function showName(event) {
  const box = $('segments').getBoundingClientRect(), image = encoded?.image;
  if (!found || !image) return;
  const x = Math.floor(((event.clientX - box.left) / box.width) * image.width);
  const y = Math.floor(((event.clientY - box.top) / box.height) * image.height);
  $('segments').title = found.classes[found.labels[y * image.width + x]] ?? '';
  $('under').textContent = $('segments').title;
}

async function start() {
  if ('serviceWorker' in navigator && self.isSecureContext) {
    await navigator.serviceWorker.register('worker.js');
    await navigator.serviceWorker.ready;
    // The first visit was answered without the headers that threads ask for.
    if (!self.crossOriginIsolated && !sessionStorage.reloaded) {
      sessionStorage.reloaded = 'yes';
      return location.reload();
    }
  }
  const page = await (await fetch('page.json')).json(), runtime = page.runtimes[await chooseRuntime(page)];
  say(`Loading ${page.model_mb} MB of model and ${runtime.mb} MB of ONNX Runtime …`);
  segmenter = await Segmenter.load();
  const {num_stages: stages, examples} = segmenter.bundle;
  Object.assign($('stage'), {max: stages, value: stages});
  $('stage-row').hidden = stages < 2;
  $('names').value = segmenter.bundle.class_names.join(', ');
  $('about').textContent = segmenter.bundle.about;
  $('examples').append(...examples.map(file => {
    const image = Object.assign(document.createElement('img'), {src: file, alt: file, tabIndex: 0});
    image.onclick = async () => open(await (await fetch(file)).blob(), file);
    return image;
  }));
  document.body.dataset.ready = 'yes';
  say('Ready: drop an image, or choose one.');
  if (examples.length) $('examples').firstChild.click();
}

$('file').onchange = event => openFirst(event.target.files);
$('camera').onclick = () => useCamera().catch(error => say(`No camera: ${error.message}`, true));
$('names').oninput = $('threshold').oninput = () => enqueue(segment);
$('opacity').oninput = () => { drawSegments(); drawGroups(); };
$('stage').oninput = drawGroups;
$('mask').onclick = saveMask;
$('json').onclick = saveJson;
$('segments').onmousemove = showName;
document.ondragover = event => event.preventDefault();
document.ondrop = event => {
  event.preventDefault();
  openFirst(event.dataTransfer.files);
};
document.onpaste = event => openFirst(event.clipboardData.files);
start().catch(error => say(`The model could not be loaded: ${error.message}`, true));
