"use strict";
// Everything is built from text nodes: names and reasons come from other people's machines.
const $ = id => document.getElementById(id), state = {};
const PHASES = {prepare: "Preparing the data", shared: "Training the shared components", partition: "Partitioning the corpus", router: "Fitting the router",
  publish: "Publishing the run", experts: "Taking experts", evaluate: "Evaluating the model", done: "Done"};
let source = null, lastId = "", skew = 0, heard = 0, lostSince = 0;

function make(tag, attributes, ...children) {
  const {text, ...rest} = attributes || {}, element = document.createElement(tag);
  for (const [name, value] of Object.entries(rest)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  element.append(...children.filter(child => child));
  return element;
}
function draw(tag, attributes, text, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined && text !== null) element.textContent = text;
  element.append(...children);
  return element;
}
const say = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text };
const fill = (id, ...children) => $(id).replaceChildren(...children.filter(child => child));
const none = text => make("p", {class: "none", text});
const td = (label, ...children) => make("td", {"data-label": label}, make("div", {}, ...children.filter(child => child)));
const known = value => value !== null && value !== undefined;
const number = (value, digits = 0) => known(value) ? value.toLocaleString("en", {minimumFractionDigits: digits, maximumFractionDigits: digits}) : "-";
const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
const perplexity = value => number(value, !known(value) || value < 100 ? 2 : value < 1000 ? 1 : 0);
const colour = index => index < 8 ? `var(--c${index})` : `hsl(${index * 137.5 % 360} 55% 55%)`;
const now = () => Date.now() / 1000 - skew;
function size(bytes) { return bytes >= 2 ** 30 ? `${number(bytes / 2 ** 30, 1)} GiB` : `${number(bytes / 2 ** 20, bytes < 2 ** 22 ? 1 : 0)} MiB` }
function duration(seconds) {
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${number(seconds / 3600, 1)} h` : `${number(seconds / 86400, 1)} days`;
}
function clock(at) {
  const moment = new Date(at * 1000), today = new Date().toDateString() === moment.toDateString();
  return moment.toLocaleString("en-GB", today ? {hour: "2-digit", minute: "2-digit"} : {weekday: "short", hour: "2-digit", minute: "2-digit"});
}
function bar(share) {
  const inner = make("i");
  inner.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  return make("div", {class: "bar"}, inner);
}

// Charts --------------------------------------------------------------------------------------------------------------
function ticks(low, high, wanted) {
  const raw = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(raw)), step = [1, 2, 5, 10].find(m => m * power >= raw) * power, marks = [];
  for (let mark = Math.ceil(low / step) * step; mark <= high + step * 1e-6; mark += step) marks.push(+mark.toPrecision(12));
  return marks;
}
// series: [{name, colour, points: [[x, y]], dots}]; options: base (a horizontal line), x (label of an x), whole (ticks of x are integers).
function chart(id, series, options) {
  const points = series.flatMap(s => s.points), width = $(id).clientWidth;
  if (!points.length || !width) return fill(id, none(options.empty));
  const height = 220, left = 46, right = 12, top = 8, bottom = 24;
  let xs = points.map(p => p[0]), ys = points.map(p => p[1]).concat(known(options.base) ? [options.base] : []);
  let [x0, x1] = options.range || [Math.min(...xs), Math.max(...xs)], y0 = Math.min(...ys), y1 = Math.max(...ys);
  if (x0 === x1) { x0 -= .5; x1 += .5 }
  const room = Math.max((y1 - y0) * .08, Math.abs(y1) * .005, .005); y0 -= room; y1 += room;
  const X = x => left + (x - x0) / (x1 - x0) * (width - left - right), Y = y => top + (y1 - y) / (y1 - y0) * (height - top - bottom);
  const svg = draw("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.label});
  const digits = y1 - y0 < 1 ? 2 : y1 - y0 < 10 ? 1 : 0;
  for (const y of ticks(y0, y1, 4)) svg.append(draw("line", {class: "grid", x1: left, x2: width - right, y1: Y(y), y2: Y(y)}),
    draw("text", {x: left - 6, y: Y(y) + 4, "text-anchor": "end"}, number(y, digits)));
  const marks = options.whole ? ticks(x0, x1, Math.min(8, width / 70)).filter(Number.isInteger) : [x0, (x0 + x1) / 2, x1];
  let before = "";
  for (const x of marks) {
    const text = options.x ? options.x(x) : number(x);
    if (text !== before) svg.append(draw("text", {x: X(x), y: height - 6, "text-anchor": X(x) > width - 40 ? "end" : X(x) < left + 20 ? "start" : "middle"}, before = text));
  }
  svg.append(draw("line", {class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom}));
  if (known(options.base)) svg.append(draw("line", {class: "base", x1: left, x2: width - right, y1: Y(options.base), y2: Y(options.base)}));
  for (const s of series) {
    const path = draw("path", {d: s.points.map((p, i) => `${i ? "L" : "M"}${X(p[0]).toFixed(1)} ${Y(p[1]).toFixed(1)}`).join(""), fill: "none", "stroke-width": 2, "stroke-linejoin": "round", "data-points": s.points.length});
    path.style.stroke = s.colour;
    svg.append(path);
    for (const p of s.dots || s.points.length === 1 ? s.points : s.points.slice(-1)) {
      const dot = draw("circle", {cx: X(p[0]), cy: Y(p[1]), r: s.dots ? 3.5 : 3}, null, draw("title", {}, `${s.name}: ${options.x ? options.x(p[0]) : number(p[0])}, ${number(p[1], 3)}`));
      dot.style.fill = s.colour;
      svg.append(dot);
    }
  }
  const key = make("div", {class: "key"});
  for (const s of series) {
    const swatch = make("i"); swatch.style.background = s.colour;
    key.append(make("span", {}, swatch, s.name));
  }
  if (known(options.base)) key.append(make("span", {}, make("i", {class: "dash"}), `shared components alone ${perplexity(options.base)}`));
  fill(id, svg, key);
}
function partitionChart() {
  const newest = state.quality, alone = state.baseline ? state.baseline.partitions : [], id = "by-partition";
  const rows = newest ? newest.partitions.map((value, index) => [index, value, alone[index]]).filter(row => known(row[1])) : [];
  const width = $(id).clientWidth;
  if (!rows.length || !width) return fill(id, none("Measured once the run is published."));
  const values = rows.flatMap(row => [row[1], row[2]]).filter(known), low = Math.min(...values), high = Math.max(...values), step = 30, left = 26, right = 104;
  const X = value => left + 12 + (high > low ? (value - low) / (high - low) : .5) * (width - left - right - 24);
  const svg = draw("svg", {viewBox: `0 0 ${width} ${rows.length * step}`, height: rows.length * step, role: "img", "aria-label": "Perplexity of each partition, now and with the shared components alone"});
  rows.forEach(([index, value, base], row) => {
    const y = row * step + step / 2;
    svg.append(draw("line", {class: "grid", x1: left, x2: width - right, y1: y, y2: y}), draw("text", {x: left - 8, y: y + 4, "text-anchor": "end"}, index));
    if (known(base)) {
      const move = draw("line", {x1: X(base), x2: X(value), y1: y, y2: y, "stroke-width": 3});
      move.style.stroke = value <= base ? "var(--good)" : "var(--bad)";
      const ring = draw("circle", {cx: X(base), cy: y, r: 4.5, "stroke-width": 2}, null, draw("title", {}, `shared components alone: ${perplexity(base)}`));
      ring.style.stroke = "var(--soft)"; ring.style.fill = "var(--card)";
      svg.append(move, ring);
    }
    const dot = draw("circle", {cx: X(value), cy: y, r: 5}, null, draw("title", {}, `now: ${perplexity(value)}`));
    dot.style.fill = "var(--blue)";
    const label = draw("text", {class: "value", x: width, y: y + 4, "text-anchor": "end"}, perplexity(value));
    if (known(base)) label.append(draw("tspan", {"fill-opacity": .65}, `  of ${perplexity(base)}`));
    svg.append(dot, label);
  });
  const ring = make("i", {class: "dot ring"}), dot = make("i", {class: "dot"}); dot.style.background = "var(--blue)";
  fill(id, svg, make("div", {class: "key"}, make("span", {}, dot, "the model now"), make("span", {}, ring, "shared components alone")));
}
function curves() {
  const all = Object.entries(state).filter(([name]) => name.startsWith("curve ")).map(([name, points]) => [name.slice(6), points]);
  const own = all.filter(([name]) => name !== "shared").sort((a, b) => a[0] - b[0]);
  chart("losses", own.map(([name, points]) => ({name: `expert ${name}`, colour: colour(+name), points})),
    {empty: "Nodes report their losses while they train.", label: "Training loss of every expert against steps", whole: true});
  chart("shared-loss", all.filter(([name]) => name === "shared").map(([, points]) => ({name: "shared components", colour: colour(0), points})),
    {empty: "The coordinator reports it while it trains them.", label: "Training loss of the shared components against steps", whole: true});
}
function qualityCharts() {
  const measured = (state.evaluations || []).filter(row => known(row.mean_perplexity)), base = state.baseline ? state.baseline.mean_perplexity : null;
  const rows = [...new Map(measured.map(row => [row.experts, row])).values()], total = state.run ? state.run.experts : 1, empty = "Measured once the run is published.";
  const line = (name, x, value, index) => ({name, colour: colour(index), dots: true, points: rows.filter(row => known(row[value])).map(row => [x(row), row[value]])});
  const both = x => [line("mean of the partitions", x, "mean_perplexity", 0), line("all tokens", x, "pooled_perplexity", 1)];
  chart("by-experts", both(row => row.experts), {base, empty, range: [0, total], whole: true, label: "Perplexity against the number of accepted experts"});
  chart("by-time", both(row => row.at).map(s => ({...s, points: s.points.sort((a, b) => a[0] - b[0])})), {base, empty, x: clock, label: "Perplexity against time"});
  partitionChart();
}
function router() {
  const report = state.router, width = Math.min($("router").clientWidth, 760);
  if (!report || !report.layers.length || !width) return fill("router", none(report ? "This router is too large to be drawn." : "Measured by the evaluation."));
  const select = $("layer"), layers = report.layers;
  if (select.options.length !== layers.length + 1) {
    fill("layer", make("option", {value: "mean", text: "all layers"}), ...layers.map((_, index) => make("option", {value: index, text: `layer ${index}`})));
  }
  const mean = select.value === "mean", size = layers[0].matrix.length;
  const matrix = mean ? layers[0].matrix.map((row, p) => row.map((_, e) => layers.reduce((sum, layer) => sum + layer.matrix[p][e], 0) / layers.length)) : layers[+select.value].matrix;
  say("accuracy", ` ${number(100 * (mean ? report.token_accuracy : layers[+select.value].token_accuracy))} % of held-out tokens go to their partition's expert first`);
  const left = 30, columns = matrix[0].length, step = Math.min(64, (width - left) / columns), high = Math.min(step, 44);
  const svg = draw("svg", {viewBox: `0 0 ${width} ${size * high + 22}`, height: size * high + 22, role: "img", "aria-label": "Mean weight of each expert on each partition's tokens"});
  matrix.forEach((row, p) => {
    svg.append(draw("text", {x: left - 8, y: p * high + high / 2 + 4, "text-anchor": "end"}, p));
    row.forEach((weight, e) => {
      const cell = draw("rect", {x: left + e * step + 1, y: p * high + 1, width: Math.max(1, step - 2), height: Math.max(1, high - 2), rx: 3, "fill-opacity": .06 + .94 * weight}, null,
        draw("title", {}, `partition ${p}, expert ${e}: ${number(weight, 3)}`));
      cell.style.fill = "var(--heat)";
      svg.append(cell);
      if (step >= 34) {
        const text = draw("text", {x: left + e * step + step / 2, y: p * high + high / 2 + 4, "text-anchor": "middle", class: "value"}, number(weight, 2));
        if (weight > .55) text.style.fill = "var(--card)";
        svg.append(text);
      }
    });
  });
  matrix[0].forEach((_, e) => { if (step >= 16 || e % 4 === 0) svg.append(draw("text", {x: left + e * step + step / 2, y: size * high + 16, "text-anchor": "middle"}, e)) });
  fill("router", svg, make("p", {class: "soft", text: "Rows: the partition that a text is from. Columns: the expert. Mean weight; each row sums to 1."}));
}

// Sections ------------------------------------------------------------------------------------------------------------
function run() {
  say("name", state.run.name);
  say("about", `${plural(state.run.experts, "expert")}, ${number(state.run.parameters / 1e6, 1)} million parameters`);
  say("foot", `Run ${state.run.run_id}, config ${state.run.config_fingerprint.slice(0, 12)}. Every number is also in "forge-coordinator status --json".`);
}
function phase() {
  const p = state.phase, done = p.phase === "done", published = p.stages.every(stage => stage.done);
  say("phase", PHASES[p.phase] || p.phase);
  say("sentence", p.sentence + (known(p.loss) ? `; loss ${number(p.loss, 3)}` : "") + (p.tokens_per_second ? `; ${number(p.tokens_per_second)} tokens/s` : ""));
  const stages = [...p.stages, {stage: "experts", done, now: published}, {stage: "done", done}];
  fill("stages", ...stages.map(s => make("li", {class: s.done ? "done" : s.now ? "now" : "", title: s.stage, text: s.stage})));
  progress();
}
function progress() {
  if (!state.phase) return;
  const p = state.phase, experts = state.experts || [], accepted = experts.filter(e => e.shows === "accepted").length;
  const share = p.phase === "done" ? 1 : p.phase === "experts" ? accepted / Math.max(1, experts.length) : p.steps ? p.step / p.steps : 0;
  $("done").style.width = `${100 * share}%`;
}
function estimate() {
  const e = state.estimate;
  say("until", e.until === "the end" ? "Time left" : `Time left until ${e.until}`);
  say("left", e.seconds === 0 && e.until === "the end" ? "none" : known(e.seconds) ? `about ${duration(Math.max(1, e.seconds))}` : "not known yet");
  say("because", e.because);
}
function quality() {
  const q = state.quality;
  if (!q) { say("quality", "not measured yet"); say("change", ""); return say("detail", "The first evaluation comes when the run is published.") }
  fill("quality", perplexity(q.mean_perplexity), make("small", {text: " perplexity"}));
  const better = known(q.change) && q.change < 0;
  $("change").className = better ? "good" : "";
  say("change", !known(q.change) ? "" : Math.abs(q.change) < .0005 ? "the same as the shared components alone"
    : `${number(100 * Math.abs(q.change), 1)} % ${better ? "below" : "above"} the shared components alone (${perplexity(q.shared_mean_perplexity)})`);
  say("detail", `Measured with ${plural(q.experts, "expert")}, mean of the partitions; all tokens together: ${perplexity(q.pooled_perplexity)}` +
    (known(q.bits_per_byte) ? `, ${number(q.bits_per_byte, 3)} bits a byte.` : "."));
}
function cell(e) {
  const lines = [make("b", {text: e.partition}), make("span", {class: "state", text: e.shows})], busy = ["leased", "training", "uploading"].includes(e.shows);
  if (busy && (e.steps || e.bytes_total)) lines.push(bar(e.steps ? e.step / e.steps : e.bytes / e.bytes_total));
  if (e.node_name) lines.push(make("p", {text: e.node_name}));
  if (e.shows === "training") lines.push(make("p", {class: "soft", text: `step ${number(e.step)} of ${number(e.steps)}` + (known(e.training_loss) ? `, loss ${number(e.training_loss, 3)}` : "")}));
  else if (busy && e.bytes_total) lines.push(make("p", {class: "soft", text: `${size(e.bytes)} of ${size(e.bytes_total)}`}));
  else if (known(e.loss) && known(e.shared_loss)) lines.push(make("p", {class: "soft", text: `loss ${number(e.loss, 3)}, was ${number(e.shared_loss, 3)}`}));
  else lines.push(make("p", {class: "soft", text: `${number(e.tokens)} tokens`}), known(e.shared_loss) && make("p", {class: "soft", text: `loss to beat: ${number(e.shared_loss, 3)}`}));
  const reason = e.rejected.join("; ");
  if (reason) lines.push(e.shows === "rejected" ? make("p", {class: "why", text: reason}) : make("p", {class: "soft was", title: reason, text: `a shard was rejected: ${reason}`}));
  return make("div", {class: `cell ${e.shows}`, "data-partition": e.partition, "data-shows": e.shows}, ...lines);
}
function experts() {
  const all = state.experts, accepted = all.filter(e => e.shows === "accepted").length;
  say("count", all.length ? `${accepted} of ${all.length} accepted` : "");
  fill("experts", ...(all.length ? all.map(cell) : [none("The partitions open when the run is published.")]));
  progress();
}
function nodes() {
  const shown = state.nodes.shown;
  say("joined", state.nodes.total > shown.length ? `the ${shown.length} heard of last, of ${number(state.nodes.total)}` : "");
  if (!shown.length) return fill("nodes", none("No node has joined yet."));
  const soft = text => make("div", {class: "soft", text});
  const rows = shown.map(n => make("tr", {},
    td("Node", n.name),
    td("Machine", `${plural(n.cores, "core")}, ${n.device || "cpu"}`, soft([n.hostname, n.platform].filter(Boolean).join(", "))),
    td("Work", known(n.partition) ? `${n.activity || "leased"} expert ${n.partition}` : n.revoked ? "sent away" : "waits"),
    td("Tokens/s", number(n.tokens_per_second)),
    td("RAM", known(n.resident_bytes) ? `${size(n.resident_bytes)} of ${size(n.ram_limit_bytes)}` : `- of ${size(n.ram_limit_bytes)}`,
      known(n.resident_bytes) && n.ram_limit_bytes ? bar(n.resident_bytes / n.ram_limit_bytes) : null),
    td("Last seen", make("span", {class: "age", "data-at": n.seen_at})),
    td("Shards", `${number(n.accepted)} accepted`, n.rejected ? make("div", {class: "bad", text: `${number(n.rejected)} rejected`}) : null)));
  const head = ["Node", "Machine", "Work", "Tokens/s", "RAM used of allowed", "Last seen", "Shards"].map(text => make("th", {scope: "col", text}));
  fill("nodes", make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows)));
  ages();
}
function contributors() {
  const shown = state.contributors, most = Math.max(...shown.map(c => c.nats || 0), 1e-9), nats = value => known(value) ? `${value < 0 ? "" : "+"}${number(value, 4)}` : "-";
  if (!shown.length) return fill("contributors", none("Nobody yet: it is measured when a shard is in the model."));
  fill("contributors", make("table", {}, make("thead", {}, make("tr", {}, ...["Node", "Contribution", "Expert by expert"].map(text => make("th", {scope: "col", text})))),
    make("tbody", {}, ...shown.map((c, index) => make("tr", {}, td("Node", `${known(c.nats) ? `${index + 1}. ` : ""}${c.name}`),
      td("Contribution", nats(c.nats), known(c.nats) && bar(c.nats / most)),
      td("Experts", ...c.experts.map(e => make("div", {text: `expert ${e.partition}: ${nats(e.nats)}`}))))))));
}
function topics() {
  fill("topics", ...(state.topics.length ? state.topics.map(t => make("div", {class: "topic"}, make("b", {text: `Partition ${t.partition}`}),
    make("ul", {}, ...t.words.map(word => make("li", {text: word}))), make("q", {text: t.sample}))) : [none("Known when the run is published.")]));
}
function ages() {
  for (const age of document.querySelectorAll(".age")) age.textContent = `${duration(Math.max(0, now() - age.dataset.at))} ago`;
}
function title() {
  const all = state.experts || [], accepted = all.filter(e => e.shows === "accepted").length, p = state.quality ? `, perplexity ${perplexity(state.quality.mean_perplexity)}` : "";
  document.title = `${all.length ? `${accepted}/${all.length} experts${p}` : PHASES[state.phase.phase]} - ${state.run.name}`;
}

// The line to the coordinator -----------------------------------------------------------------------------------------
const RENDER = {run: [run], phase: [phase], estimate: [estimate], quality: [quality, partitionChart], experts: [experts], contributors: [contributors], nodes: [nodes], topics: [topics],
  evaluations: [qualityCharts], baseline: [qualityCharts], router: [router]};
function take(event) {
  const message = JSON.parse(event.data);
  lastId = event.lastEventId; heard = Date.now(); skew = heard / 1000 - message.now;
  if (message.full) for (const name of Object.keys(state)) delete state[name];
  Object.assign(state, message.sections);
  const changed = Object.keys(message.sections), todo = new Set(changed.flatMap(name => name.startsWith("curve ") ? [curves] : RENDER[name] || []));
  if (message.full) todo.add(curves);
  for (const render of todo) render();
  if (changed.length) title();
  online(true);
}
function online(live) {
  if (live) lostSince = 0; else lostSince = lostSince || Date.now();
  $("line").className = live ? "live" : "lost";
  say("line", live ? "live" : `no answer since ${clock(lostSince / 1000)}; trying again`);
}
function connect() {
  if (source) source.close();
  source = new EventSource(`events?after=${encodeURIComponent(lastId)}`);
  heard = Date.now();
  source.onmessage = take;
  source.onerror = () => {
    online(false);
    if (source.readyState === EventSource.CLOSED) setTimeout(connect, 3000);  // Refused: the browser gives up, we do not.
  };
}
setInterval(() => {
  ages();
  if (Date.now() - heard > 35000) { online(false); connect() }  // The coordinator says something every ten seconds.
}, 1000);
$("layer").addEventListener("change", router);
let resizing = 0;
addEventListener("resize", () => { cancelAnimationFrame(resizing); resizing = requestAnimationFrame(() => { qualityCharts(); curves(); router() }) });
connect();
