// The data of the page: an index, token texts, and packed blocks that are decoded when shown.
// The layout of a block is described in hsd/credit/packing.py.

const byId = (id) => document.getElementById(id);
const index = JSON.parse(byId("index").textContent);
const tokenTexts = JSON.parse(byId("tokens").textContent);

const UNIT = 2 ** -16;
const MISSING = -(2 ** 31);

// Every rollout in the order of the file.
const rollouts = index.groups.flatMap((group, g) =>
  group.rollouts.map((rollout, place) => ({ ...rollout, group, place, block: `b${g}-${place}` })));
rollouts.forEach((rollout, number) => { rollout.number = number; });

function peerOf(rollout) {
  if (rollout.peer === null) return null;
  const first = rollout.number - rollout.place;
  return rollouts.slice(first, first + rollout.group.rollouts.length)
    .find((other) => other.index === rollout.peer) ?? null;
}

async function inflate(base64) {
  const bytes = Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function unpack(base64, contextCount) {
  const planes = await inflate(base64);
  const count = planes.length / 4;
  const words = new Uint32Array(count);
  for (let i = 0; i < count; i++) {
    words[i] = (planes[i] | planes[count + i] << 8 | planes[2 * count + i] << 16
      | planes[3 * count + i] << 24) >>> 0;
  }
  const [n, m, k] = words;
  let at = 3;
  const take = (length) => words.subarray(at, at += length);
  const nats = (length) =>
    Float64Array.from(new Int32Array(take(length)), (v) => v === MISSING ? NaN : v * UNIT);
  const ids = take(n);
  const logprob = nats(n);
  const entropy = nats(n);
  const weight = new Float32Array(take(n).slice().buffer);
  const contexts = [];
  for (let c = 0; c < contextCount; c++) {
    const view = { logprob: nats(n), kl: nats(n), entropy: nats(n) };
    view.credit = view.logprob.map((q, i) => q - logprob[i]);
    contexts.push(view);
  }
  const positions = new Map(Array.from(take(m), (position, row) => [position, row]));
  const tops = [];
  for (let side = 0; side <= contextCount; side++) {
    tops.push({ ids: take(m * k), logprobs: nats(m * k) });
  }
  const topAt = (side, position) => {
    const row = positions.get(position);
    if (row === undefined) return null;
    return Array.from({ length: k }, (_, j) => ({
      id: tops[side].ids[row * k + j], logprob: tops[side].logprobs[row * k + j],
    }));
  };
  return { n, ids, logprob, entropy, weight, contexts, topAt };
}

const decoded = new Map(); // block -> numbers, the most recently used last
const MOST_DECODED = 32;

// The numbers of a rollout: per-token arrays, and a view per context of the page, null where that
// context gives the rollout no teacher.
async function numbersOf(rollout) {
  let numbers = decoded.get(rollout.block);
  if (!numbers) {
    const present = rollout.credit.filter((credit) => credit !== null).length;
    numbers = await unpack(byId(rollout.block).textContent, present);
    let next = 0;
    numbers.side = rollout.credit.map((credit) => credit === null ? null : ++next);
    numbers.views = numbers.side.map((side) => side === null ? null : numbers.contexts[side - 1]);
  }
  decoded.delete(rollout.block);
  decoded.set(rollout.block, numbers);
  if (decoded.size > MOST_DECODED) decoded.delete(decoded.keys().next().value);
  return numbers;
}

const textOf = (id) => tokenTexts[id] ?? `<${id}>`;
const contextLabel = (c) => index.labels[index.contexts[c]] ?? index.contexts[c];
