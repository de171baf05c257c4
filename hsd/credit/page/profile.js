// The credit around the divergence: the file's mean with its band, and the shown rollout.

function shape(tag, attributes) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function drawProfile(rollout, numbers, context) {
  const data = index.summary.contexts[index.contexts[context]];
  const all = data?.profile ?? [];
  const most = Math.max(0, ...all.map((p) => p.count));
  const points = all.filter((p) => 10 * p.count >= most); // as in hsd.credit.profiles.bars
  const caption = byId("profile-caption");
  if (!points.length) {
    byId("profile").replaceChildren();
    caption.textContent = "No failing rollout with a peer has this context.";
    return;
  }
  const width = 300, height = 150, left = 30, bottom = 22, top = 6;
  const view = rollout.tau === null ? null : numbers.views[context];
  const own = view ? Array.from(view.credit, (credit, i) => [i - rollout.tau, Math.abs(credit)])
    .filter(([d]) => Math.abs(d) <= index.summary.window) : [];
  const reach = Math.max(2, ...points.map((p) => Math.abs(p.distance)), ...own.map(([d]) => Math.abs(d)));
  const high = Math.max(0.1, ...points.map((p) => p.mean + (p.half_width ?? 0)));
  const x = (d) => left + (d + reach) / (2 * reach) * (width - left - 6);
  const y = (v) => height - bottom - Math.min(1, v / high) * (height - bottom - top);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
  const peak = data.peak.mean === null ? "no token there" : `${number(data.peak.mean)} nats`;
  const floor = data.floor.mean === null ? "no token" : `${number(data.floor.mean)} nats`;
  svg.setAttribute("aria-label", `Mean absolute credit around the divergence with context ${contextLabel(context)}: ${peak} at it, ${floor} more than ${data.floor.beyond} tokens away`);
  svg.append(shape("line", { x1: x(0), x2: x(0), y1: top, y2: height - bottom, class: "zero" }),
    shape("line", { x1: left, x2: width - 6, y1: y(0), y2: y(0), class: "axis" }));
  for (const [d, v] of own) {
    svg.append(shape("line", { x1: x(d), x2: x(d), y1: y(0), y2: y(v), class: "own" }));
  }
  const above = points.map((p) => `${x(p.distance)},${y(p.mean + (p.half_width ?? 0))}`);
  const below = points.map((p) => `${x(p.distance)},${y(Math.max(0, p.mean - (p.half_width ?? 0)))}`);
  svg.append(shape("polygon", { points: [...above, ...below.reverse()].join(" "), class: "band" }),
    shape("polyline", { points: points.map((p) => `${x(p.distance)},${y(p.mean)}`).join(" "), class: "mean" }));
  for (const [d, anchor] of [[-reach, "start"], [0, "middle"], [reach, "end"]]) {
    const label = shape("text", { x: x(d), y: height - 6, "text-anchor": anchor });
    label.textContent = d === 0 ? "τ" : String(d).replace("-", "−");
    svg.append(label);
  }
  for (const v of [0, high]) {
    const label = shape("text", { x: left - 4, y: y(v) + 4, "text-anchor": "end" });
    label.textContent = v.toFixed(v ? 1 : 0);
    svg.append(label);
  }
  byId("profile").replaceChildren(svg);
  caption.textContent = `Mean |A| in nats with ${contextLabel(context)} over ${index.summary.failed_with_peer} failing rollouts, with its 95 % band`
    + (own.length ? "; bars: this rollout." : ".") + ` At τ ${peak}; more than ${data.floor.beyond} tokens away ${floor}.`;
}
