"use strict";
// Everything shown is set as text, never as HTML: names, answers and logs come from strangers.

const EVERY_MS = 2000;
const MOST_SHOWN = 200000;
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];
const $ = (id) => document.getElementById(id);
let chosen = null;
let functions = [];
let state = null;

function make(tag, text, className) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (className) element.className = className;
  return element;
}

function size(bytes) {
  let unit = 0;
  while (bytes >= 1024 && unit < UNITS.length - 1) { bytes /= 1024; unit += 1; }
  return `${bytes >= 100 || unit === 0 ? Math.round(bytes) : bytes.toFixed(1)} ${UNITS[unit]}`;
}

function time(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  return seconds < 1 ? `${(seconds * 1000).toFixed(1)} ms` : `${seconds.toFixed(2)} s`;
}

// Inside the server a function is NAME in the default namespace and NAME.NAMESPACE in any other.
const keyOf = (each) => (each.namespace === "openfaas-fn" ? each.name : `${each.name}.${each.namespace}`);
const nameOf = (model) => model.split("@")[0];
const shortImage = (image) => image.replace(/(sha256:[0-9a-f]{12})[0-9a-f]+/, "$1…") || "–";

async function ask(path, options) {
  const response = await fetch(path, options);
  if (response.ok) return response;
  let reason = `${response.status} ${response.statusText}`;
  try { reason = (await response.json()).error || reason; } catch { /* it has no JSON body */ }
  throw new Error(reason);
}

function block(model, bytes, capacity, className, says) {
  const element = make("div", nameOf(model), className);
  element.style.width = `${(100 * bytes) / capacity}%`;
  element.title = `${nameOf(model)}: ${size(bytes)}, ${says}`;
  return element;
}

function drawGpu(gpu) {
  const box = make("div", undefined, "gpu");
  const head = make("p");
  head.append(make("strong", gpu.gpu_id), make("span", `${size(gpu.used_bytes)} of ${size(gpu.capacity_bytes)}`, "quiet"));
  const memory = make("div", undefined, "memory");
  for (const each of [...gpu.residents].reverse()) {
    const kind = each.state !== "hot" ? "loading" : each.model === gpu.running ? "running" : "hot";
    memory.append(block(each.model, each.memory_bytes, gpu.capacity_bytes, kind, `${kind}, ${each.uses} runs, last ${time(each.idle_s)} ago`));
  }
  for (const each of gpu.parked.filter((parked) => parked.device_bytes)) {
    memory.append(block(each.model, each.device_bytes, gpu.capacity_bytes, "parked", `parked: ${size(each.host_bytes)} in host memory`));
  }
  const foot = make("p");
  const doing = gpu.running ? `running ${nameOf(gpu.running)}` : "idle";
  const warm = gpu.parked.length ? `, ${gpu.parked.length} parked` : "";
  foot.append(make("span", `${gpu.kind}, ${doing}${warm}`, "quiet"), make("span", `${Math.round(100 * gpu.busy_ratio)} % busy`, "quiet"));
  box.append(head, memory, foot);
  return box;
}

function drawFunction(each) {
  const row = make("tr");
  const counts = state.functions.find((known) => known.name === keyOf(each)) || {};
  const runs = (counts.hits || 0) + (counts.restores || 0) + (counts.misses || 0);
  const button = make("button", each.name);
  button.type = "button";
  button.addEventListener("click", () => choose(each));
  const first = make("td");
  first.append(button);
  if (each.hotset.problem) first.append(make("div", each.hotset.problem, "problem"));
  const hot = (counts.hot || []).map((gpu) => gpu.replace(/^local\//, ""));
  const warm = (counts.warm || []).map((gpu) => `${gpu.replace(/^local\//, "")} (warm)`);
  const memory = each.hotset.measured_memory_bytes || each.hotset.gpu_memory_bytes;
  row.append(first, make("td", shortImage(each.image)), make("td", each.hotset.kind), make("td", [...hot, ...warm].join(", ") || "–"));
  const numbers = [memory ? size(memory) : "–", `${each.availableReplicas} of ${each.replicas}`, each.hotset.waiting,
    each.invocationCount, runs ? `${Math.round((100 * counts.hits) / runs)} %` : "–", time(counts.mean_latency_s)];
  row.append(...numbers.map((text) => make("td", text, "number")));
  if (chosen && keyOf(chosen) === keyOf(each)) row.className = "picked";
  return row;
}

function draw() {
  const ratio = state.hit_ratio === null ? "" : `, ${Math.round(100 * state.hit_ratio)} % of runs were hits`;
  $("summary").textContent = `${state.healthy ? "healthy" : "NOT HEALTHY"} · ${state.policy} · ${functions.length} functions here · `
    + `${state.requests} ${state.requests === 1 ? "call" : "calls"}${ratio} · ${state.waiting} waiting`;
  $("summary").classList.toggle("bad", !state.healthy);
  $("gpus").replaceChildren(...state.gpus.map(drawGpu));
  const text = $("find").value.toLowerCase();
  const shown = functions.filter((each) => `${each.name} ${each.image}`.toLowerCase().includes(text));
  shown.sort((a, b) => a.name.localeCompare(b.name));
  if (document.activeElement.closest("#functions") === null) $("functions").replaceChildren(...shown.map(drawFunction));
  $("empty").hidden = functions.length > 0;
  const now = chosen && functions.find((each) => keyOf(each) === keyOf(chosen));
  if (now) describe(now);
}

async function refresh() {
  if (document.hidden) return;
  try {
    const namespace = encodeURIComponent($("namespace").value);
    const [now, listed] = await Promise.all([ask("/system/state"), ask(`/system/functions?namespace=${namespace}`)]);
    state = await now.json();
    functions = await listed.json();
    draw();
    if (chosen) await logs();
  } catch (error) {
    $("summary").textContent = `The server does not answer: ${error.message}`;
    $("summary").classList.add("bad");
  }
}

async function logs() {
  const query = new URLSearchParams({ name: chosen.name, namespace: chosen.namespace, tail: "100" });
  const lines = (await (await ask(`/system/logs?${query}`)).text()).split("\n").filter(Boolean).map((line) => JSON.parse(line));
  const log = $("logs");
  const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 4;
  log.textContent = lines.map((line) => `${line.timestamp.slice(11, 23)} ${line.text}`).join("\n") || "nothing yet";
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function details(each) {
  const gpu = each.hotset.kind === "gpu";
  const found = {
    image: each.image, version: each.hotset.model, command: each.envProcess,
    "deployed at": new Date(each.createdAt).toLocaleString(), "at most in a batch": gpu ? each.hotset.max_batch : null,
    "time limit": `${each.hotset.timeout_s} s`,
    ...each.annotations, ...Object.fromEntries(Object.entries(each.labels).filter(([name]) => name !== "faas_function")),
  };
  return Object.entries(found).filter(([, value]) => value).flatMap(([name, value]) => [make("dt", name), make("dd", value)]);
}

function describe(each) {
  chosen = each;
  $("chosen-title").textContent = each.name;
  $("problem").hidden = !each.hotset.problem;
  $("problem").textContent = each.hotset.problem || "";
  $("details").replaceChildren(...details(each));
  $("scale-zero").hidden = each.hotset.kind !== "gpu";
}

function choose(each) {
  describe(each);
  $("chosen").hidden = false;
  $("logs").textContent = "";
  clear();
  refresh();
  $("chosen").scrollIntoView({ block: "nearest" });
}

function clear() {
  $("outcome").textContent = "";
  $("outcome").className = "";
  $("answer").hidden = $("picture").hidden = true;
}

async function show(response) {
  const type = response.headers.get("content-type") || "";
  const blob = await response.blob();
  if (/^image\/(png|jpeg|gif|webp)$/.test(type)) {
    URL.revokeObjectURL($("picture").src);
    $("picture").src = URL.createObjectURL(blob);
    $("picture").hidden = false;
    return;
  }
  let text = await blob.slice(0, MOST_SHOWN).text();
  if (type.startsWith("application/json")) {
    try { text = JSON.stringify(JSON.parse(text), null, 2); } catch { /* shown as it is */ }
  }
  $("answer").textContent = blob.size > MOST_SHOWN ? `${text}\n… of ${size(blob.size)}` : text;
  $("answer").hidden = false;
}

async function invoke(event) {
  event.preventDefault();
  clear();
  $("outcome").textContent = "running";
  const headers = { "content-type": $("type").value };
  if ($("key").value) headers["x-api-key"] = $("key").value;
  const began = performance.now();
  try {
    const path = `/function/${encodeURIComponent(`${chosen.name}.${chosen.namespace}`)}`;
    const response = await fetch(path, { method: "POST", body: $("body").value, headers });
    const told = ["queue", "load", "inference"].map((part) => [part, response.headers.get(`x-hotset-${part}-seconds`)])
      .filter(([, value]) => value !== null).map(([part, value]) => `${part} ${time(Number(value))}`);
    const where = response.headers.get("x-hotset-gpu");
    if (where) told.unshift(`${response.headers.get("x-hotset-cache")} on ${where}`);
    $("outcome").textContent = [response.status, time((performance.now() - began) / 1000), ...told].join(" · ");
    $("outcome").className = response.ok ? "" : "bad";
    await show(response);
  } catch (error) {
    $("outcome").textContent = `The call failed: ${error.message}`;
    $("outcome").className = "bad";
  }
  refresh();
}

async function scaleToZero() {
  try {
    await ask(`/system/scale-function/${encodeURIComponent(chosen.name)}?namespace=${encodeURIComponent(chosen.namespace)}`, {
      method: "POST", body: JSON.stringify({ serviceName: chosen.name, replicas: 0 }), headers: { "content-type": "application/json" },
    });
    refresh();
  } catch (error) {
    $("outcome").textContent = error.message;
    $("outcome").className = "bad";
  }
}

function close() {
  chosen = null;
  $("chosen").hidden = true;
  draw();
}

async function start() {
  try {
    const namespaces = await (await ask("/system/namespaces")).json();
    $("namespace").append(...namespaces.map((name) => make("option", name)));
  } catch (error) {
    $("summary").textContent = error.message;
  }
  await refresh();
  setInterval(refresh, EVERY_MS);
}

$("invoke").addEventListener("submit", invoke);
$("scale-zero").addEventListener("click", scaleToZero);
$("close").addEventListener("click", close);
$("find").addEventListener("input", () => state && draw());
$("namespace").addEventListener("change", refresh);
document.addEventListener("visibilitychange", refresh);
start();
