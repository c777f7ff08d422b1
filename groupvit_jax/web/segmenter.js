// GroupViT in the browser: encodes an image once, and segments it into any classes, as groupvit_jax/predictor.py does.
// Letters: K windows of side W, N patches, S segments, C classes, E joint embedding. Arrays are flat and row-major.

import {encode} from './tokenizer.js';

let ort;  // ONNX Runtime, once it is loaded
const CLASS_FILTER = 5;  // classes kept per window: those that fit its pooled feature best

// The build of ONNX Runtime to load, of those that page.json lists: WebGPU's where it was copied in and there is one.
export async function chooseRuntime({runtimes}) {
  const usable = runtimes.webgpu && 'Suspending' in WebAssembly && await navigator.gpu?.requestAdapter();
  return usable ? 'webgpu' : 'wasm';
}

export class Segmenter {
  // Loads the model that lies beside this file.
  static async load() {
    const read = async file => (await fetch(file)).json();
    const [bundle, page] = await Promise.all([read('bundle.json'), read('page.json')]);
    const provider = await chooseRuntime(page), {module, binary} = page.runtimes[provider];
    ort = await import(`./${module}`);
    ort.env.wasm.wasmPaths = new URL('./', import.meta.url).href;
    ort.env.wasm.numThreads = self.crossOriginIsolated ? navigator.hardwareConcurrency : 1;
    const packed = (await fetch(binary)).body;
    ort.env.wasm.wasmBinary = await new Response(packed.pipeThrough(new DecompressionStream('gzip'))).arrayBuffer();
    const open = file => ort.InferenceSession.create(file, {executionProviders: [provider]});
    const image = await open('image.onnx'), text = await open('text.onnx');
    return new Segmenter({...bundle, ...page, provider}, image, text);
  }

  constructor(bundle, image, text) {
    Object.assign(this, {bundle, image, text, embeds: new Map()});
  }

  // Encodes an image, {data: RGBA bytes, width, height}.
  async encode(image) {
    const {window: side} = this.bundle, sides = [image.width, image.height];
    const scale = Math.min((4 * side) / Math.max(...sides), side / Math.min(...sides));
    const [width, height] = sides.map(length => Math.floor(length * scale + 0.5)), size = {width, height};
    if (Math.min(size.width, size.height) < side) throw new Error('The image is more than four times as long as wide.');
    const pixels = resize(image, size), tops = starts(size.height, side), lefts = starts(size.width, side);
    const windows = [];
    for (const top of tops) {
      for (const left of lefts) windows.push({top, left, ...(await this.encodeWindow(pixels, size.width, top, left))});
    }
    // The groups of the whole image, seen as one square: for a square, its only window.
    const square = () => this.encodeWindow(resize(image, {width: side, height: side}), side, 0, 0);
    const {maps} = width === side && height === side ? windows[0] : await square();
    return {image, size, windows, groups: maps};
  }

  async encodeWindow(pixels, width, top, left) {
    const {window: side, patch_size: patch} = this.bundle, grid = side / patch;
    const data = new Uint8Array(side * side * 3);
    for (let y = 0; y < side; y++) {
      data.set(pixels.subarray(3 * ((top + y) * width + left), 3 * ((top + y) * width + left + side)), 3 * y * side);
    }
    const out = await this.image.run({images: new ort.Tensor('uint8', data, [1, side, side, 3])});
    const [, numSegments, embedDim] = out.segment_embeds.dims;
    const maps = affinities(out).map(({affinity, count}) => segmentMap(affinity, count, grid, side));
    return {
      maps,
      segments: maps.at(-1),
      pooled: unit(out.image_embeds.data),
      embeds: Array.from({length: numSegments}, (_, s) =>
        unit(out.segment_embeds.data.subarray(s * embedDim, (s + 1) * embedDim))),
    };
  }

  // Unit embeddings of class names; the synonyms of 'dog|puppy' are averaged.
  async embedClasses(names) {
    const synonyms = names.map(name => name.split('|').map(each => each.trim().replace(/\s+/g, ' ')));
    const wanted = [...new Set(synonyms.flat())].filter(name => !this.embeds.has(name));
    if (wanted.length) {
      const {templates, context_length: length, tokenizer} = this.bundle;
      const texts = wanted.flatMap(name => templates.map(template => template.replace('{}', name)));
      const tokens = new ort.Tensor('int32', encode(tokenizer, texts, length), [texts.length, length]);
      const {data, dims: [, embedDim]} = (await this.text.run({tokens})).text_embeds;
      wanted.forEach((name, i) => {
        const rows = templates.map((_, t) => i * templates.length + t);
        this.embeds.set(name, unit(mean(rows.map(row => data.subarray(row * embedDim, (row + 1) * embedDim)))));
      });
    }
    return synonyms.map(each => unit(mean(each.map(name => this.embeds.get(name)))));
  }

  // Label of each pixel of the image, and each class's highest score. With a threshold, label 0 is the background.
  async segment(encoded, names, threshold) {
    const texts = await this.embedClasses(names), count = texts.length + (threshold > 0);
    const {width, height} = encoded.size, side = this.bundle.window;
    const total = new Float32Array(width * height * count), covers = new Uint8Array(width * height);
    for (const window of encoded.windows) {
      const scores = this.classScores(window, texts, threshold);
      for (let y = 0; y < side; y++) {
        for (let x = 0; x < side; x++) {
          const pixel = (window.top + y) * width + window.left + x, row = scores[window.segments[y * side + x]];
          for (let c = 0; c < count; c++) total[pixel * count + c] += row[c];
          covers[pixel]++;
        }
      }
    }
    const best = new Float32Array(count);
    total.forEach((sum, i) => {
      total[i] = sum / covers[Math.floor(i / count)];
      best[i % count] = Math.max(best[i % count], total[i]);
    });
    return {labels: labelPixels(total, count, encoded.size, encoded.image), scores: best};
  }

  // [S][C] softmax of the filtered logits times softmax of all; the background, if there is one, comes first.
  classScores(window, texts, threshold) {
    const scale = this.bundle.logit_scale;
    const order = texts.map((text, c) => [dot(window.pooled, text), c]).sort((a, b) => b[0] - a[0] || a[1] - b[1]);
    const kept = new Set(order.slice(0, CLASS_FILTER).map(pair => pair[1]));
    const rows = window.embeds.map(segment => {
      const logits = texts.map(text => scale * dot(segment, text));
      const all = softmax(logits), filtered = softmax(logits.map((logit, c) => (kept.has(c) ? logit : -Infinity)));
      return all.map((probability, c) => probability * filtered[c]);
    });
    if (!(threshold > 0)) return rows;
    const bests = rows.map(row => Math.max(...row)), bound = Math.min(threshold, Math.max(...bests));
    return rows.map((row, s) => [bests[s] < bound ? 1 : 0, ...row]);
  }
}

// Per stage, the affinity [N, S] of each patch to each segment: the product of the assignments so far.
function affinities(out) {
  const found = [];
  for (let stage = 1; out[`assignments_${stage}`]; stage++) {
    const {data, dims: [, count, inputs]} = out[`assignments_${stage}`], before = found.at(-1);
    const patches = before ? before.affinity.length / before.count : inputs;
    const affinity = new Float32Array(patches * count);
    for (let n = 0; n < patches; n++) {
      for (let s = 0; s < count; s++) {
        let sum = before ? 0 : data[s * inputs + n];
        for (let g = 0; before && g < inputs; g++) sum += before.affinity[n * inputs + g] * data[s * inputs + g];
        affinity[n * count + s] = sum;
      }
    }
    found.push({affinity, count});
  }
  return found;
}

// The segment of each pixel [W, W]: bilinear from the grid of patches, then the argmax.
function segmentMap(affinity, count, grid, side) {
  const map = new Uint8Array(side * side), taps = interpolation(grid, side);
  for (let y = 0; y < side; y++) {
    for (let x = 0; x < side; x++) {
      const [top, bottom, down] = taps[y], [left, right, across] = taps[x];
      let best = -Infinity;
      for (let s = 0; s < count; s++) {
        const at = (row, column) => affinity[(row * grid + column) * count + s];
        const upper = Math.fround(at(top, left) * (1 - down) + at(bottom, left) * down);
        const lower = Math.fround(at(top, right) * (1 - down) + at(bottom, right) * down);
        const value = upper * (1 - across) + lower * across;
        if (value > best) [best, map[y * side + x]] = [value, s];
      }
    }
  }
  return map;
}

// The argmax over classes of scores [height, width, count], resized bilinearly to the image.
function labelPixels(scores, count, size, image) {
  const labels = new Uint8Array(image.width * image.height);
  const rows = interpolation(size.height, image.height), columns = interpolation(size.width, image.width);
  for (let y = 0; y < image.height; y++) {
    for (let x = 0; x < image.width; x++) {
      const [top, bottom, down] = rows[y], [left, right, across] = columns[x];
      const at = (row, column) => (row * size.width + column) * count;
      const corners = [at(top, left), at(top, right), at(bottom, left), at(bottom, right)];
      const weights = [(1 - down) * (1 - across), (1 - down) * across, down * (1 - across), down * across];
      let best = -1;
      for (let c = 0; c < count; c++) {
        let value = 0;
        for (let i = 0; i < 4; i++) value += weights[i] * scores[corners[i] + c];
        if (value > best) [best, labels[y * image.width + x]] = [value, c];
      }
    }
  }
  return labels;
}

// Lower sample, upper sample and weight of the upper one at each output position; pixels have their centres at halves.
function interpolation(sizeIn, sizeOut) {
  return Array.from({length: sizeOut}, (_, i) => {
    const position = Math.max(((2 * i + 1) * sizeIn - sizeOut) / (2 * sizeOut), 0), low = Math.floor(position);
    return [low, Math.min(low + 1, sizeIn - 1), position - low];
  });
}

// RGB bytes of an RGBA image at another size: averaged where it shrinks, bilinear where it grows.
function resize({data, width, height}, size) {
  const rows = samples(height, size.height), columns = samples(width, size.width);
  const pixels = new Uint8Array(size.width * size.height * 3);
  for (let y = 0; y < size.height; y++) {
    for (let x = 0; x < size.width; x++) {
      const sum = [0, 0, 0];
      for (const [row, a] of rows[y]) {
        for (const [column, b] of columns[x]) {
          for (let c = 0; c < 3; c++) sum[c] += a * b * data[4 * (row * width + column) + c];
        }
      }
      for (let c = 0; c < 3; c++) pixels[3 * (y * size.width + x) + c] = Math.round(sum[c]);
    }
  }
  return pixels;
}

// [input position, weight] pairs of each output position along one axis.
function samples(sizeIn, sizeOut) {
  if (sizeOut >= sizeIn) {
    return interpolation(sizeIn, sizeOut).map(([low, high, weight]) => [[low, 1 - weight], [high, weight]]);
  }
  const step = sizeIn / sizeOut;
  return Array.from({length: sizeOut}, (_, i) => {
    const pairs = [];
    for (let j = Math.floor(i * step); j < Math.min(Math.ceil((i + 1) * step), sizeIn); j++) {
      const covered = Math.min(j + 1, (i + 1) * step) - Math.max(j, i * step);
      if (covered > 1e-9) pairs.push([j, covered / step]);
    }
    return pairs;
  });
}

function starts(length, side) {
  const stride = Math.max(Math.floor(side / 2), 1), count = Math.ceil(Math.max(length - side, 0) / stride) + 1;
  return Array.from({length: count}, (_, i) => Math.min(i * stride, length - side));
}

const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
const mean = rows => rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);

function unit(vector) {
  const norm = Math.sqrt(dot(vector, vector));
  return Array.from(vector, value => value / norm);
}

function softmax(logits) {
  const most = Math.max(...logits), powers = logits.map(logit => Math.exp(logit - most));
  const sum = powers.reduce((a, b) => a + b, 0);
  return powers.map(power => power / sum);
}
