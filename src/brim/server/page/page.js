"use strict";
// The memory page. Asks /memory/live once a second while it is seen, and draws; everything shown is text of this document.

const $ = (id) => document.getElementById(id);
const EVERY_MS = 1000, PATIENCE_MS = 12000, KEPT_S = 600, RATE_OVER_S = 5, FIRST_OVER_S = 60, FEW = 20;
const STATES = ["active", "cached", "free", "uncommitted"];  // from the bottom of the chart up
const OUTSIDE = new Set(["other_processes", "reserve", "free"]);
const ORDER = ["context", "weights", "buffers", "workspace", "activations", "graphs", "adapters", "unattributed", "kv_cache",
  "headroom", "other_processes", "reserve", "free"];
const KNOWN = {
  computed: "Computed: it follows from shapes and settings, and was checked against what was measured.",
  measured: "Measured: the difference between two readings of the device or of this process.",
  predicted: "Predicted: nothing can measure it before requests come, so it is set aside.",
};
const PHASES = {
  open: "reads the device, fixes the cap, makes the plan", load: "streams the weights into their final layout",
  reserve: "takes addresses for the largest KV cache there could be", warm: "runs every kernel once, makes every buffer",
  measure: "runs the largest steps there can be", capture: "records steps to replay them later",
  commit: "gives the KV cache what the cap leaves", prove: "runs the largest steps again over the full cache",
};
const view = { key: "", samples: [], last: null, ledger: "", scale: "cap", asking: null, answering: null };

// -- text

function bytesText(bytes) {
  const size = Math.abs(bytes);
  for (const [unit, name] of [[2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]])
    if (size >= unit - unit / 2048) return `${(bytes / unit).toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 })} ${name}`;
  return `${bytes} B`;
}
const count = (number) => number.toLocaleString("en");
const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
function percent(part, whole) {
  const share = whole > 0 ? 100 * part / whole : 0;
  return share > 0 && share < 0.05 ? "< 0.1 %" : `${share.toFixed(share < 9.95 ? 1 : 0)} %`;
}
const duration = (seconds) => seconds < 1 ? `${Math.round(1000 * seconds)} ms` : `${seconds.toFixed(2)} s`;
function put(id, text) { if ($(id).textContent !== text) $(id).textContent = text; }
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

// -- asking

async function ask(path, options = {}) {
  const headers = { ...(options.headers || {}), ...(view.key ? { Authorization: `Bearer ${view.key}` } : {}) };
  const answer = await fetch(path, { cache: "no-store", ...options, headers });
  if (answer.status === 401) {
    if ($("key-form").hidden) { $("key-form").hidden = false; $("key").focus(); }
    else if (view.key) tell("That key is not known to this server.");
    throw new Error("key");
  }
  return answer;
}

async function poll() {
  clearTimeout(view.asking);
  if (!document.hidden && ($("key-form").hidden || view.key)) {
    const patience = new AbortController(), timer = setTimeout(() => patience.abort(), PATIENCE_MS);
    try {
      const answer = await ask("/memory/live", { signal: patience.signal });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      show(await answer.json());
    } catch (error) {
      if (error.message !== "key") gone();
      else view.key = "";
    } finally { clearTimeout(timer); }
  }
  clearTimeout(view.asking);
  view.asking = setTimeout(poll, EVERY_MS);
}

function tell(text) { put("notice", text); $("notice").hidden = !text; }
function state(name, text) { $("state").dataset.state = name; put("state-text", text); $("main").classList.toggle("stale", name !== "serving"); }
function gone() {
  const since = view.last ? ` The figures below are of ${clock(view.last.taken_s)}.` : "";
  state("gone", "No answer");
  tell(`The server does not answer; it may have ended. Trying again each second.${since}`);
}

// -- showing

function show(found) {
  $("key-form").hidden = true;
  const { server, engine, memory } = found;
  put("model", server.names[0]);
  document.title = `${server.names[0]}: Brim memory`;
  put("restarts", count(engine.restarts));
  const phase = engine.phases.find((one) => !one.is_done);
  const doing = phase ? `${phase.name}${phase.text ? `: ${phase.text}` : ""}${phase.fraction === null ? "" : `, ${Math.round(100 * phase.fraction)} %`}` : "";
  if (engine.state === "serving") state("serving", "Serving");
  else if (engine.state === "starting") state("starting", doing ? `Starting (${phase.name})` : "Starting");
  else state("down", phase ? `Restarting (${phase.name})` : "Not serving");
  const old = view.last && engine.state !== "starting" ? ` The figures below are of ${clock(view.last.taken_s)}.` : "";
  tell(engine.state === "serving" ? engine.reason : `${engine.reason}${memory ? "" : old}`);  // an alert: no figure that moves
  showPhases(memory && engine.state === "serving" ? memory.phases : engine.phases, doing);
  remember(found);
  if (memory) {
    view.last = found;
    showLedger(memory);
    showNow(found);
    showKV(memory.kv);
    showAbout(found);
  }
  drawChart();
  $("download").disabled = !(engine.state === "serving" && found.info && found.info.has_certificate);
  $("send").disabled = engine.state !== "serving" || view.answering !== null;
  if (server.takes_chat !== null) put("prompt-label", server.takes_chat ? "Your message" : "Text to continue (this model has no chat template)");
}

function remember(found) {
  const last = view.samples.at(-1);
  if (last && (found.taken_s < last.time || (found.tokens && last.tokens && found.tokens.generated < last.tokens.generated))) view.samples = [];
  if (last && last.time === found.taken_s) return;
  view.samples.push({ time: found.taken_s, tokens: found.tokens, first: found.first_token, kv: found.memory ? kvBytes(found.memory.kv) : null });
  while (view.samples[0].time < found.taken_s - KEPT_S) view.samples.shift();
}

function kvBytes(kv) {
  const sum = { active: 0, cached: 0, free: 0, uncommitted: 0 };
  for (const group of kv.groups || [])
    for (const name of STATES) sum[name] += group.num_blocks[name === "active" ? "used" : name] * group.block_bytes;
  return sum;
}

/** The latest sample and the oldest within so many seconds before it that both have figures; null before there are two. */
function span(seconds) {
  const known = view.samples.filter((one) => one.tokens), last = known.at(-1);
  const first = last && known.find((one) => one.time >= last.time - seconds);
  return first && first !== last ? [first, last] : null;
}

function showNow(found) {
  put("running", count(found.requests.running));
  put("waiting", count(found.requests.waiting));
  const recent = span(RATE_OVER_S);
  for (const [name, id] of [["generated", "out"], ["prompt", "in"]]) {
    put(`rate-${id}`, recent ? ((recent[1].tokens[name] - recent[0].tokens[name]) / (recent[1].time - recent[0].time)).toFixed(1) : "–");
    put(`total-${id}`, `${count(found.tokens[name])} so far`);
  }
  const first = found.first_token, minute = span(FIRST_OVER_S);
  const fresh = minute ? minute[1].first.count - minute[0].first.count : 0;
  if (!first.count) { put("first", "–"); put("first-note", "no request yet"); return; }
  const mean = fresh ? (minute[1].first.sum_s - minute[0].first.sum_s) / fresh : first.sum_s / first.count;
  const most = first.buckets.find((one) => one.count >= 0.95 * first.count);
  put("first", duration(mean));
  put("first-note", `mean of ${count(fresh || first.count)} ${fresh ? "in the last minute" : "since the start"}`
    + (most.within_s === null || first.count < FEW ? "" : `; 95 % of all within ${duration(most.within_s)}`));
}

// -- the ledger

function showLedger(memory) {
  const parts = kvBytes(memory.kv), rows = [...memory.ledger].sort((a, b) => ORDER.indexOf(a.category) - ORDER.indexOf(b.category));
  const ours = rows.filter((line) => !OUTSIDE.has(line.category)), held = ours.reduce((sum, line) => sum + line.bytes, 0);
  const headroom = memory.cap_bytes - held, device = view.scale === "device";
  put("ledger-sum", `${bytesText(held)} held of a cap of ${bytesText(memory.cap_bytes)}`
    + (headroom >= 0 ? `, ${bytesText(headroom)} of headroom` : `, ${bytesText(-headroom)} OVER THE CAP`)
    + (memory.resident_bytes === undefined ? "." : `. Read now: ${bytesText(memory.resident_bytes)} held, ${bytesText(memory.peak_bytes)} at most since the start, `
      + `${bytesText(memory.free_bytes)} of the device's ${bytesText(memory.total_bytes)} free.`));
  const drawn = ours.filter((line) => line.bytes > 0);
  let total = memory.cap_bytes;
  if (device) {
    const rest = rows.filter((line) => OUTSIDE.has(line.category) && line.category !== "free");
    drawn.push(...rest);
    total = memory.total_bytes;
  }
  const left = total - drawn.reduce((sum, line) => sum + line.bytes, 0);
  if (left > 0) drawn.push({ category: device ? "free" : "headroom", owner: device ? "free" : "headroom", bytes: left });
  const whole = Math.max(total, drawn.reduce((sum, line) => sum + line.bytes, 0));
  $("bar").replaceChildren(...drawn.map((line) => segment(line, whole, parts)));
  $("bar").setAttribute("aria-label", `${device ? "The device" : "The cap"}, ${bytesText(total)}: `
    + drawn.map((line) => `${line.owner} ${bytesText(line.bytes)} (${percent(line.bytes, whole)})`).join(", "));
  if (view.ledger === JSON.stringify(rows)) return;  // opened lines and the reader's place stay
  view.ledger = JSON.stringify(rows);
  const open = new Set([...document.querySelectorAll("details.line[open]")].map((one) => one.dataset.owner));
  const focused = document.activeElement.closest?.("details.line")?.dataset.owner;
  const list = (lines) => lines.map((line) => ledgerLine(line, memory, open.has(line.owner)));
  $("lines").replaceChildren(
    make("p", { class: "lines-head" }, "Held by this server"), ...list(ours),
    make("p", { class: "lines-head" }, "On the same device, not ours"), ...list(rows.filter((line) => OUTSIDE.has(line.category))));
  if (focused) lineOf(focused)?.querySelector("summary").focus();
}

const lineOf = (owner) => [...document.querySelectorAll("details.line")].find((one) => one.dataset.owner === owner);
function paint(element, category) {
  element.classList.add(category);
  if (category !== "kv_cache" && category !== "headroom") element.style.backgroundColor = `var(--${category})`;
  return element;
}

function segment(line, whole, parts) {
  const part = paint(make("span", { title: `${line.owner}: ${bytesText(line.bytes)}` }), line.category);
  part.style.width = `${100 * line.bytes / whole}%`;
  part.dataset.bytes = line.bytes;
  if (line.category === "kv_cache") {
    const sum = STATES.reduce((all, name) => all + parts[name], 0) || 1;
    for (const name of STATES) {
      const inner = make("span", { class: name === "free" ? "kv-free" : name, title: `KV cache, ${name}: ${bytesText(parts[name])}` });
      inner.style.width = `${100 * parts[name] / sum}%`;
      part.append(inner);
    }
  }
  part.addEventListener("click", () => {
    const found = lineOf(line.owner);
    if (found) { found.open = true; found.querySelector("summary").focus(); }
  });
  return part;
}

function ledgerLine(line, memory, isOpen) {
  const cap = OUTSIDE.has(line.category) ? memory.total_bytes : memory.cap_bytes;
  const summary = make("summary", {}, paint(make("i", { "aria-hidden": "true" }), line.category), make("span", {}, line.owner),
    make("span", { class: "right" }, bytesText(line.bytes)), make("span", { class: "right quiet share-of" }, percent(line.bytes, cap)),
    make("span", { class: "quiet known" }, line.known_by));
  const details = make("details", { class: "line" }, summary, make("p", {}, line.explanation, " ",
    make("span", { class: "quiet" }, `${KNOWN[line.known_by] || ""} Category ${line.category}, ${count(line.bytes)} bytes.`)));
  details.dataset.owner = line.owner;
  details.open = isOpen;
  return details;
}

// -- the KV cache

function showKV(kv) {
  const group = (kv.groups || [])[0];
  if (!group) return;
  const tokens = group.num_tokens, sum = kvBytes(kv);
  put("kv-sum", `${count(tokens.used)} of ${count(kv.kv_tokens)} tokens are in use, ${count(tokens.cached)} are kept for prompts that begin alike.`
    + (kv.groups.length > 1 ? " Tokens are those of the layers that see the whole context; bytes are of all layers." : ""));
  for (const name of STATES) put(`now-${name}`, `${bytesText(sum[name])}, ${count(tokens[name === "active" ? "used" : name])} tokens`);
}

function drawChart() {
  const known = view.samples.filter((one) => one.kv);
  if (!known.length) return;
  const end = view.samples.at(-1).time, begin = Math.min(view.samples[0].time, end - 60);
  const most = Math.max(...known.map((one) => STATES.reduce((all, name) => all + one.kv[name], 0))) || 1;
  const x = (time) => (600 * (time - begin) / (end - begin)).toFixed(1), y = (bytes) => (160 - 160 * bytes / most).toFixed(1);
  const runs = [];  // of samples without a gap: while the engine is down nothing is known and nothing is drawn
  view.samples.forEach((one, i) => {
    if (!one.kv) return;
    if (!i || !view.samples[i - 1].kv) runs.push([]);
    runs.at(-1).push(one);
  });
  STATES.forEach((name, level) => {
    const upTo = (kv, to) => STATES.slice(0, to).reduce((all, one) => all + kv[one], 0);
    const path = runs.map((run) => `M${run.map((one) => `${x(one.time)} ${y(upTo(one.kv, level + 1))}`).join("L")}L`
      + `${run.toReversed().map((one) => `${x(one.time)} ${y(upTo(one.kv, level))}`).join("L")}Z`).join("");
    $(`kv-${name}`).setAttribute("d", path);
  });
  put("kv-most", bytesText(most));
  put("kv-since", clock(begin));
  const now = known.at(-1).kv;
  $("kv-chart").setAttribute("aria-label", `KV cache from ${clock(begin)} to ${clock(end)}. At last: `
    + STATES.map((name) => `${name} ${bytesText(now[name])}`).join(", ") + ". The table below has the course.");
  const rows = known.filter((one, i) => i === known.length - 1 || Math.floor(one.time / 10) !== Math.floor(known[i + 1].time / 10));
  if ($("kv-table").closest("details").open) $("kv-table").replaceChildren(...rows.toReversed().map((one) =>
    make("tr", {}, make("td", {}, clock(one.time)), ...STATES.map((name) => make("td", {}, bytesText(one.kv[name]))))));
}

// -- the start

function showPhases(phases, doing) {
  if (!phases.length) return;
  const all = phases.reduce((sum, phase) => sum + phase.seconds, 0);
  put("start-sum", doing ? `${all.toFixed(1)} s so far; now ${doing}.` : `${all.toFixed(2)} s in ${phases.length} phases.`);
  $("phases").replaceChildren(...phases.map((phase) => {
    const share = make("span", { class: "share" });
    share.style.width = `${100 * phase.seconds / (all || 1)}%`;
    return make("tr", {}, make("td", {}, phase.name, make("span", { class: "what" }, phase.text && !phase.is_done ? phase.text : PHASES[phase.name] || "")),
      make("td", { class: "right" }, phase.seconds.toFixed(2)), make("td", { class: "wide" }, share),
      make("td", { class: "right" }, phase.bytes === undefined ? "–" : bytesText(phase.bytes)),
      make("td", { class: "right" }, phase.peak_bytes === undefined ? "–" : bytesText(phase.peak_bytes)));
  }));
}

function showAbout({ server, info }) {
  const device = info.device || {};
  const rows = [["Model", info.model], ["Served as", server.names.join(", ")], ["Architecture", info.family && `${info.family}, ${count(info.num_parameters)} parameters`],
    ["Computed in", info.dtype], ["Device", [device.device, device.platform].filter(Boolean).join(", ")],
    ["Kernels", info.kernels && `${info.kernels}${info.kernels_reason ? ` (${info.kernels_reason})` : ""}`],
    ["Graphs", info.graph_mode && `${info.graph_mode}${info.graph_mode_reason ? ` (${info.graph_mode_reason})` : ""}`], ["Compiled", info.compile],
    ["Longest request", info.max_model_len && `${count(info.max_model_len)} tokens; ${count(info.full_length_requests ?? 0)} of them at once`],
    ["Largest step", info.max_num_seqs && `${count(info.max_num_seqs)} sequences, ${count(info.max_num_batched_tokens ?? 0)} tokens`],
    ["Does without", (info.avoided || []).map((one) => `${one.feature}: ${one.reason}`).join("; ")], ["Brim", server.version]];
  const known = rows.filter(([, value]) => value), text = JSON.stringify(known);
  if ($("about").dataset.shown === text) return;
  $("about").dataset.shown = text;
  $("about").replaceChildren(...known.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]));
}

async function download() {
  put("download-note", "");
  try {
    const answer = await ask("/memory/certificate");
    if (!answer.ok) { put("download-note", (await answer.json()).error.message); return; }
    const name = /filename="([^"]+)"/.exec(answer.headers.get("content-disposition"))?.[1] ?? "certificate.json";
    const address = URL.createObjectURL(await answer.blob()), link = make("a", { href: address, download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  } catch (error) { put("download-note", "The server does not answer."); }
}

// -- the prompt

async function send() {
  const chat = view.last.server.takes_chat, prompt = $("prompt").value, began = performance.now();
  const body = { model: view.last.server.names[0], stream: true, stream_options: { include_usage: true }, max_tokens: Number($("max-tokens").value), temperature: Number($("temperature").value),
    ...(chat ? { messages: [{ role: "user", content: prompt }] } : { prompt }) };
  const shown = document.createTextNode("");
  let first = null, usage = null, failure = "";
  $("answer").hidden = false;
  $("answer").replaceChildren(...(chat ? [] : [make("span", { class: "quiet" }, prompt)]), shown);
  $("answer").setAttribute("aria-busy", "true");  // read aloud once, when it is whole
  put("try-note", "");
  view.answering = new AbortController();
  $("send").disabled = true; $("stop").disabled = false;
  try {
    const answer = await ask(chat ? "/v1/chat/completions" : "/v1/completions",
      { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal: view.answering.signal });
    if (!answer.ok) throw new Error((await answer.json()).error.message);
    for await (const event of events(answer.body)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices?.[0], text = choice ? (chat ? choice.delta?.content : choice.text) : "";
      if (text) { first ??= performance.now(); shown.data += text; }
      usage = event.usage ?? usage;
    }
  } catch (error) { failure = error.name === "AbortError" ? "Stopped." : error.message === "key" ? "" : error.message || "The server does not answer."; }
  const end = performance.now(), seconds = (end - began) / 1000;
  const rest = usage && first && usage.completion_tokens > 1 ? `, then ${((usage.completion_tokens - 1) / ((end - first) / 1000)).toFixed(1)} tokens/s` : "";
  const times = usage ? `${count(usage.completion_tokens)} tokens in ${duration(seconds)}${first ? `; the first after ${duration((first - began) / 1000)}${rest}` : ""}, as seen from this browser.` : "";
  put("try-note", failure || times);
  $("answer").setAttribute("aria-busy", "false");
  view.answering = null;
  $("send").disabled = false; $("stop").disabled = true;
}

/** The JSON objects of a stream of server-sent events, until [DONE]. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { value, done } = await reader.read();
    if (done) return;
    const frames = (rest + value).split("\n\n");
    rest = frames.pop();
    for (const frame of frames) if (frame.startsWith("data: {")) yield JSON.parse(frame.slice(6));
  }
}

// -- what people do

function stored(store, name, value) {  // both stores may be forbidden
  try { return value === undefined ? store().getItem(name) : store().setItem(name, value); } catch { return null; }
}
function setTheme(name) { if (name) document.documentElement.dataset.theme = name; else delete document.documentElement.dataset.theme; $("theme").value = name; }

setTheme(stored(() => localStorage, "brim-theme") || "");
view.key = stored(() => sessionStorage, "brim-key") || "";
$("theme").addEventListener("change", () => { setTheme($("theme").value); stored(() => localStorage, "brim-theme", $("theme").value); });
$("key-form").addEventListener("submit", (event) => { event.preventDefault(); view.key = $("key").value; $("key").value = ""; stored(() => sessionStorage, "brim-key", view.key); tell(""); poll(); });
$("try").addEventListener("submit", (event) => { event.preventDefault(); if (view.last && !view.answering) send(); });
$("prompt").addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("try").requestSubmit(); });
$("stop").addEventListener("click", () => view.answering?.abort());
$("download").addEventListener("click", download);
for (const one of document.querySelectorAll("input[name=scale]")) one.addEventListener("change", () => { view.scale = one.value; if (view.last) showLedger(view.last.memory); });
$("kv-table").closest("details").addEventListener("toggle", drawChart);
document.addEventListener("visibilitychange", () => { if (!document.hidden) poll(); });
poll();
