// The page reads /status.json once a second and shows it. Texts only ever become text: nothing is parsed as HTML.
"use strict";

const LOOK_MS = 1000, ANSWER_MS = 5000, ROWS_MAX = 16;
const at = (id) => document.getElementById(id);
const seen = new Map(); // job -> [committed step, when it was first seen here]

function element(tag, about = {}, ...children) {
  const made = Object.assign(document.createElement(tag), about);
  made.append(...children);
  return made;
}

function size(bytes) {
  if (bytes === null || bytes === undefined) return "-";
  const gib = bytes / 2 ** 30;
  return gib >= 1 ? `${gib.toFixed(1)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
}

function losses(count) {
  if (count === null) return "It is not known how many nodes can be lost.";
  if (count === 0) return "No node can be lost.";
  return `${count} more ${count === 1 ? "node" : "nodes"} can be lost in every group.`;
}

function duration(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

function sinceCommit(job) {
  const known = seen.get(job.name);
  if (!known || known[0] !== job.committed_step) {
    // What was committed before this page was opened has an unknown age.
    seen.set(job.name, [job.committed_step, known ? Date.now() : null]);
  }
  const since = seen.get(job.name)[1];
  return since === null ? "not seen yet" : `${duration((Date.now() - since) / 1000)} ago`;
}

function jobCard(job) {
  const tone = { HEALTHY: "good", DEGRADED: "warn" }[job.verdict] || "bad";
  const facts = [
    ["verdict", element("span", { className: tone }, job.verdict)],
    ["more losses", job.more_losses === null ? "-" : String(job.more_losses)],
    ["last commit", sinceCommit(job)],
    ["protected in", job.protect_s ? `${job.protect_s.toFixed(2)} s` : "-"],
    ["snapshot", size(job.snapshot_bytes)],
    ["ranks", String(job.ranks)],
  ];
  if (job.digest_failures) facts.push(["bad chunks found", element("span", { className: "bad" }, String(job.digest_failures))]);
  const list = element("dl");
  for (const [name, value] of facts) list.append(element("dt", {}, name), element("dd", {}, value));
  const step = job.committed_step === null ? "nothing committed" : `step ${job.committed_step}`;
  return element("div", { className: "job" },
    element("b", {}, job.name + (job.closed ? " (closed)" : "")),
    element("span", { className: "step" }, step), list);
}

// Over all jobs: how much of what a node should hold is gone, and what part of that is back.
function loss(node) {
  let lost = 0, back = 0, running = false;
  for (const held of Object.values(node.jobs)) {
    lost += held.lost_bytes;
    back += held.rebuilt_bytes;
    running = running || held.rebuild === "running";
  }
  return { lost, share: lost ? back / lost : 1, running };
}

function groupMap(names, nodes, parity, index) {
  const members = names.map((name) => nodes.get(name));
  const table = element("table");
  const head = element("tr", {}, element("th"));
  for (const node of members) head.append(element("th", { scope: "col", title: node.name }, node.name));
  table.append(element("thead", {}, head));
  const rows = Math.min(names.length, ROWS_MAX);
  const body = element("tbody");
  for (let stripe = 0; stripe < rows; stripe += 1) {
    const row = element("tr", {}, element("th", { scope: "row" }, String(stripe)));
    members.forEach((node, position) => {
      // The m parity chunks of stripe s lie on the nodes (s + j) mod n.
      const isParity = (position - stripe % names.length + names.length) % names.length < parity;
      const kind = isParity ? "parity" : "data";
      const gone = loss(node);
      const away = node.state !== "up";
      const state = away ? " away" : gone.lost ? " lost" : "";
      const cell = element("span", { className: `cell ${kind}${state}`, title: `${node.name}: ${kind}${state}` });
      if (gone.lost && !away) {
        const filled = Math.min(Math.max(gone.share * rows - stripe, 0), 1);
        const fill = element("u");
        fill.style.width = `${filled * 100}%`;
        cell.append(fill);
      }
      row.append(element("td", {}, cell));
    });
    body.append(row);
  }
  table.append(body);
  return element("div", { className: "group" }, element("p", { className: "note" }, `group ${index}`), table);
}

function nodeRow(node) {
  const gone = loss(node);
  const tone = node.state === "up" ? (gone.lost ? "warn" : "good") : "bad";
  const mark = { good: "● ", warn: "◐ ", bad: "○ " }[tone];
  const memory = element("td", {}, node.budget_bytes ? `${size(node.arena_bytes)} of ${size(node.budget_bytes)}` : "-");
  if (node.budget_bytes) memory.append(bar(node.arena_bytes / node.budget_bytes));
  const holds = element("td", { className: "text" });
  for (const [name, held] of Object.entries(node.jobs)) {
    if (held.lost_bytes && held.rebuild === "running") {
      holds.append(element("div", {}, `${name}: rebuilding, ${Math.floor(100 * held.rebuilt_bytes / held.lost_bytes)} % of ${size(held.lost_bytes)}`),
        bar(held.rebuilt_bytes / held.lost_bytes));
    } else if (held.lost_bytes) {
      holds.append(element("div", { className: "bad" }, `${name}: lost ${size(held.lost_bytes)}; 'holdfast recover' rebuilds it`));
    } else {
      holds.append(element("div", {}, held.committed_step === null ? `${name}: -` : `${name}: step ${held.committed_step}`));
    }
  }
  const state = element("td", { className: node.reason ? "text" : "" },
    element("span", { className: tone }, mark + node.state), node.reason ? ` ${node.reason}` : "");
  return element("tr", {}, element("td", {}, node.name), state, holds, memory,
    element("td", {}, String(node.group)), element("td", {}, node.domain), element("td", {}, node.address));
}

function bar(share) {
  const inner = element("i");
  inner.style.width = `${Math.min(Math.max(share, 0), 1) * 100}%`;
  return element("span", { className: "bar" }, inner);
}

function show(status) {
  const nodes = new Map(status.nodes.map((node) => [node.name, node]));
  document.title = `${status.verdict}: ${status.cluster} - Holdfast`;
  at("about").textContent = `cluster ${status.cluster}, epoch ${status.epoch}, parity ${status.parity}; seen by ${status.seen_by}, collector ${status.collector}`;
  at("verdict").className = status.verdict;
  at("word").textContent = status.verdict;
  at("losses").textContent = losses(status.more_losses);
  at("reason").textContent = status.reason;
  at("jobs").replaceChildren(...(status.jobs.length ? status.jobs.map(jobCard) : [element("p", { className: "note" }, "No job has attached yet.")]));
  at("groups").replaceChildren(...status.groups.map((names, index) => groupMap(names, nodes, status.parity, index)));
  const sizes = status.groups.map((names) => names.length - status.parity);
  at("k").textContent = [...new Set(sizes)].sort((a, b) => a - b).join(" or ");
  at("nodes").replaceChildren(...status.nodes.map(nodeRow));
  at("shown").hidden = false;
}

async function look() {
  try {
    const answer = await fetch("status.json", { cache: "no-store", signal: AbortSignal.timeout(ANSWER_MS) });
    if (!answer.ok) throw new Error((await answer.text()).trim());
    show(await answer.json());
    at("stale").hidden = true;
    at("shown").classList.remove("dim");
    at("when").textContent = `as of ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    at("stale").textContent = `The daemon does not answer (${error.message}); what is below is old.`;
    at("stale").hidden = false;
    at("shown").classList.add("dim");
  }
  setTimeout(look, LOOK_MS);
}

look();
