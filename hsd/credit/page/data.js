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

// A reader of the words of a block.
async function readerOf(base64) {
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
  const view = (logprob) => {
    const read = { logprob: nats(n), kl: nats(n), entropy: nats(n) };
    read.credit = read.logprob.map((q, i) => q - logprob[i]);
    return read;
  };
  // Functions from a position to its most likely tokens; null where they were not kept.
  const tops = (sides) => {
    const positions = new Map(Array.from(take(m), (position, row) => [position, row]));
    return Array.from({ length: sides }, () => {
      const ids = take(m * k), logprobs = nats(m * k);
      return (position) => {
        const row = positions.get(position);
        if (row === undefined) return null;
        return Array.from({ length: k }, (_, j) => ({ id: ids[row * k + j], logprob: logprobs[row * k + j] }));
      };
    });
  };
  return { n, take, nats, view, tops };
}

async function unpack(base64, contextCount) {
  const { n, take, nats, view, tops } = await readerOf(base64);
  const ids = take(n);
  const logprob = nats(n);
  const entropy = nats(n);
  const weight = new Float32Array(take(n).slice().buffer);
  const contexts = Array.from({ length: contextCount }, () => view(logprob));
  return { n, ids, logprob, entropy, weight, contexts, tops: tops(1 + contextCount) };
}

// Contexts that are not in the page are in files beside it, which register their blocks here.
const registered = new Map(); // context/block -> base64
window.creditSidecar = (context, blocks) => {
  for (const [block, base64] of Object.entries(blocks)) registered.set(`${context}/${block}`, base64);
};
const requested = new Map(); // address -> promise

function loadSidecar(address) {
  if (!requested.has(address)) {
    requested.set(address, new Promise((resolve, reject) => {
      const script = document.createElement("script");
      script.src = address;
      script.addEventListener("load", resolve);
      script.addEventListener("error", () => {
        requested.delete(address); // so that it can be asked for again
        script.remove();
        reject(new Error(address));
      });
      document.head.append(script);
    }));
  }
  return requested.get(address);
}

async function addContext(rollout, numbers, context) {
  const name = index.contexts[context];
  const address = `${encodeURIComponent(index.sidecars)}/${name}-${rollout.group.part}.js`;
  try {
    await loadSidecar(address);
  } catch {
    numbers.missing = address;
    return;
  }
  const { view, tops } = await readerOf(registered.get(`${name}/${rollout.block}`));
  numbers.views[context] = view(numbers.logprob);
  numbers.side[context] = numbers.tops.push(...tops(1)) - 1;
}

const decoded = new Map(); // block -> numbers, the most recently used last
const MOST_DECODED = 32;

// The numbers of a rollout: per-token arrays, and a view per context, null where that context gives
// the rollout no teacher or is neither in the page nor the one asked for.
async function numbersOf(rollout, context) {
  let numbers = decoded.get(rollout.block);
  if (!numbers) {
    const inside = rollout.credit.map((credit, c) => credit !== null && !(index.sidecars && c > 0));
    numbers = await unpack(byId(rollout.block).textContent, inside.filter(Boolean).length);
    let next = 0;
    numbers.side = inside.map((here) => here ? ++next : null);
    numbers.views = numbers.side.map((side) => side === null ? null : numbers.contexts[side - 1]);
  }
  decoded.delete(rollout.block);
  decoded.set(rollout.block, numbers);
  if (rollout.credit[context] !== null && !numbers.views[context]) {
    await addContext(rollout, numbers, context);
  }
  if (decoded.size > MOST_DECODED) decoded.delete(decoded.keys().next().value);
  return numbers;
}

const textOf = (id) => tokenTexts[id] ?? `<${id}>`;
const contextLabel = (c) => index.labels[index.contexts[c]] ?? index.contexts[c];
