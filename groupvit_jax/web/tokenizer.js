// Tokenizers: SentencePiece BPE and CLIP's BPE, as groupvit_jax/data/tokenizer.py has them.

// Texts in, an Int32Array of texts.length * length ids out: bos if there is one, the text, eos, padding.
export function encode(tokenizer, texts, length) {
  const tokens = new Int32Array(texts.length * length).fill(tokenizer.pad_id);
  const first = tokenizer.bos_id === null ? [] : [tokenizer.bos_id];
  const textIds = tokenizer.type === 'clip' ? clipIds : sentencePieceIds;
  texts.forEach((text, row) => {
    const ids = textIds(tokenizer, text.toWellFormed()).slice(0, length - first.length - 1);
    tokens.set([...first, ...ids, tokenizer.eos_id], row * length);
  });
  return tokens;
}

const SPACE = '\u2581';

// SentencePiece's rule nmt_nfkc_cf.
function normalize(text) {
  const controls = /[\u0001-\u0008\u000b\u000e-\u001f\u007f\u008f\u009f]/g;
  const spaces = /[\s\u061c\u1680\u200b\u200c\u200e\u200f\u2581\ufeff\ufffd]/g;
  const normal = text.replace(controls, '').replace(spaces, ' ').normalize('NFKC');
  return lowerCase(normal).replace(/ς/g, 'σ').normalize('NFKC');
}

// Letter by letter: what a letter stands beside does not matter, and none becomes two. Cherokee has no lower case here.
function lowerCase(text) {
  return text.replace(/[^\u13a0-\u13f5]/gu, letter => {
    const low = letter.toLowerCase();
    return low.length > letter.length ? letter : low;
  });
}

function sentencePieceIds(tokenizer, text) {
  tokenizer.ranks ??= new Map(tokenizer.pieces.map((piece, id) => [piece, id]));
  const words = normalize(text).split(' ').filter(word => word);
  if (!words.length) return [];
  // Of the neighbours that make a piece, those of the highest score merge first, the leftmost of equals.
  const symbols = [...SPACE + words.join(SPACE)];
  for (;;) {
    let best = -1, score = -Infinity;
    for (let i = 0; i + 1 < symbols.length; i++) {
      const id = tokenizer.ranks.get(symbols[i] + symbols[i + 1]);
      if (tokenizer.normal[id] && tokenizer.scores[id] > score) [best, score] = [i, tokenizer.scores[id]];
    }
    if (best < 0) break;
    symbols.splice(best, 2, symbols[best] + symbols[best + 1]);
  }
  return symbols.flatMap(symbol => {
    const id = tokenizer.ranks.get(symbol);
    if (tokenizer.normal[id]) return [id];
    return [...new TextEncoder().encode(symbol)].map(byte => tokenizer.ranks.get(`<0x${hex(byte)}>`));
  });
}

const hex = byte => byte.toString(16).toUpperCase().padStart(2, '0');

// Bytes as letters that can be seen: printable ones stand for themselves, the others for letters from 256 on.
const BYTE_LETTERS = (() => {
  const printable = byte => (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
  let next = 256;
  return Array.from({length: 256}, (_, byte) => String.fromCodePoint(printable(byte) ? byte : next++));
})();
const CLIP_WORDS = /'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;

function clipIds(tokenizer, text) {
  tokenizer.mergeRanks ??= new Map(tokenizer.merges.map((pair, rank) => [pair, rank]));
  const words = [...text.normalize('NFC')].map(letter => letter.toLowerCase()).join('').match(CLIP_WORDS) ?? [];
  return words.flatMap(word => {
    const symbols = [...new TextEncoder().encode(word)].map(byte => BYTE_LETTERS[byte]);
    symbols[symbols.length - 1] += '</w>';
    for (;;) {
      let best = -1, rank = Infinity;
      for (let i = 0; i + 1 < symbols.length; i++) {
        const found = tokenizer.mergeRanks.get(`${symbols[i]} ${symbols[i + 1]}`);
        if (found !== undefined && found < rank) [best, rank] = [i, found];
      }
      if (best < 0) break;
      symbols.splice(best, 2, symbols[best] + symbols[best + 1]);
    }
    return symbols.map(symbol => tokenizer.vocab[symbol]);
  });
}
