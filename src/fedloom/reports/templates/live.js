// The live page: asks for what is new, and shows all of it as text.
(() => {
  "use strict";
  const FEW = 10, ROWS = 50, MOST = 40;
  const {html, shown, state: address, keep} = charts;
  const at = (id) => document.getElementById(id);
  const words = (name) => name.replace(/_/g, " ");
  const scaled = (value, units) => {
    let unit = 0;
    while (Math.abs(value) >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
    return `${unit ? value.toPrecision(3) : Math.round(value)} ${units[unit]}`;
  };
  const bytes = (count) => scaled(count, ["B", "kB", "MB", "GB", "TB"]);
  const two = (value) => String(Math.floor(value)).padStart(2, "0");
  const seconds = (value) => value < 60 ? `${value < 10 ? value.toFixed(1) : Math.round(value)} s` : value < 3600 ? `${Math.floor(value / 60)} min ${two(value % 60)} s` : `${Math.floor(value / 3600)} h ${two(value % 3600 / 60)} min`;
  const write = (id, text) => { if (at(id).textContent !== text) at(id).textContent = text; };

  let seen = null, rows = [], clients = [], generation = "", curves = {}, drawn = {};

  // Clients whose curves are drawn: those in the address, else all of a few.
  const chosen = () => {
    const named = address().getAll("client");
    if (!named.length) return clients.length <= FEW ? clients.map((own) => own[0]) : [];
    return named.map(Number).filter((own) => Number.isInteger(own) && own >= 0).slice(0, MOST);
  };
  const choose = (client, whether) => {
    const now = new Set(chosen());
    if (whether && now.size < MOST) now.add(client); else now.delete(client);
    keep((own) => { own.delete("client"); (now.size ? [...now] : ["none"]).forEach((one) => own.append("client", one)); });
    more().then(draw);
    table();
  };

  const figure = (name, title, spec) => {
    const there = spec.lines.some((line) => line.x.length);
    at("none").hidden = rows.length > 0;
    if (!there) { if (drawn[name]) drawn[name].figure.hidden = true; return; }
    if (!drawn[name]) {
      const own = html("figure");
      own.append(html("figcaption", {}, title));
      at("charts").append(own);
      drawn[name] = new charts.Chart(own, spec, title);
    } else { drawn[name].figure.hidden = false; drawn[name].update(spec); }
  };
  const line = (name, of, more) => {
    const kept = rows.filter((row) => of(row) !== null && of(row) !== undefined);
    return {name, x: kept.map((row) => row.round), y: kept.map(of), ...more};
  };
  const band = (name, key, from, to, colour) => {
    const kept = rows.filter((row) => row[key]);
    return {name, x: kept.map((row) => row.round), y: null, low: kept.map((row) => row[key][from]), high: kept.map((row) => row[key][to]), colour};
  };
  const called = (client) => { const own = clients.find((row) => row[0] === client); return own && own[1] ? own[1] : `client ${client}`; };
  const own = (key) => chosen().filter((client) => (curves[client] || {[key]: []})[key].length).map((client, place) => ({
    name: called(client), x: curves[client][key].map((point) => point[0]), y: curves[client][key].map((point) => point[1]), colour: place + 3}));
  const spread = (key, name) => clients.length > FEW ? [band(`all clients, least to most`, key, 0, 4, 7), band("all clients, tenth to tenth", key, 1, 3, 4), line(name, (row) => row[key] ? row[key][2] : null, {colour: 1})] : [];

  const draw = () => {
    if (!seen || !seen.metric) return;
    const name = words(seen.metric.name), round = {label: "round"};
    const judged = line("held-out", (row) => row.value, {});
    const sure = rows.filter((row) => row.value !== null && row.value !== undefined);
    if (sure.some((row) => row.low !== null && row.low !== undefined)) {
      judged.low = sure.map((row) => row.low ?? null);
      judged.high = sure.map((row) => row.high ?? null);
    }
    figure("metric", `Held-out ${name} by round`, {x: round, y: {label: name}, lines: [judged]});
    figure("loss", "Loss by round", {x: round, y: {label: "loss"}, lines: [line("training", (row) => row.loss), line("held-out loss", (row) => row.held_out_loss)]});
    figure("clients", `${name[0].toUpperCase()}${name.slice(1)} of clients on their own rows`, {x: round, y: {label: name}, lines: [
      ...spread("clients", "median client"), ...(clients.length > FEW ? [line("mean of the worst tenth", (row) => row.worst_tenth, {colour: 5})] : []), ...own("metric")]});
    figure("losses", "Training loss of clients", {x: round, y: {label: "loss"}, lines: [...spread("losses", "median client"), ...own("loss")]});
    const sum = (key) => { let total = 0; return rows.map((row) => (total += row[key]) / 1e6); };
    const x = rows.map((row) => row.round);
    figure("sent", "Sent so far, measured", {x: round, y: {label: "MB, all clients"}, lines: [{name: "down", x, y: sum("down")}, {name: "up", x, y: sum("up")}]});
    figure("there", "Who took part", {x: round, y: {label: "clients"}, lines: [line("drawn", (row) => row.drawn), line("left out", (row) => row.refused, {colour: 5}), line("absent", (row) => row.absent, {colour: 7})]});
  };

  const head = () => {
    const status = {running: "Running", finished: "Finished", stopped: "Stopped"}[seen.status];
    const parts = [status];
    if (seen.rounds) parts.push(seen.round === null ? "no round is over yet" : `round ${seen.round} of ${seen.rounds}`);
    else parts.push("the run has not recorded anything yet");
    if (seen.left !== null && seen.left !== undefined) parts.push(`about ${seconds(seen.left)} left`);
    if (seen.seconds) parts.push(`${seconds(seen.seconds)} in rounds so far`);
    if (seen.status === "stopped") parts.push("fedloom run --resume and its folder continue it");
    write("status", parts.join("; "));
    at("status").className = seen.status;
    at("bar").max = seen.rounds || 1;
    at("bar").value = seen.round || 0;
    write("silent", seen.status === "running" && seen.silent !== null ? `Last round recorded ${seconds(seen.silent)} ago.` : "");
    write("problem", seen.problem ? `The records cannot be read: ${seen.problem}` : "");
    at("problem").hidden = !seen.problem;
    if (!seen.metric) return;
    write("metric", `${shown(seen.before)} → ${shown(seen.now)}`);
    write("metric-name", `held-out ${words(seen.metric.name)}, ${seen.metric.higher_is_better ? "higher" : "lower"} is better`);
    write("help", seen.metric.help ? `${words(seen.metric.name)}: ${seen.metric.help}.` : "");
    write("sent", bytes(seen.down + seen.up));
    write("sent-parts", `sent in all: ${bytes(seen.down)} down, ${bytes(seen.up)} up, evaluation included`);
    const {present, absent} = seen.counts, paused = seen.counts["in quarantine"];
    write("present", `${present} of ${present + absent + paused}`);
    write("present-parts", `clients are there; ${absent} absent, ${paused} in quarantine`);
    write("refused", String(seen.refused));
    write("refused-parts", "answers were left out");
  };

  const ORDERS = {
    number: (a, b) => a[0] - b[0],
    worst: (a, b) => (seen.metric.higher_is_better ? 1 : -1) * ((a[4] ?? Infinity) - (b[4] ?? Infinity)) || a[0] - b[0],
    loss: (a, b) => (b[5] ?? -Infinity) - (a[5] ?? -Infinity) || a[0] - b[0],
    sent: (a, b) => b[6] - a[6] || a[0] - b[0],
    refused: (a, b) => b[7] - a[7] || a[0] - b[0],
    missing: (a, b) => (a[2] === "present") - (b[2] === "present") || a[0] - b[0],
  };
  const table = () => {
    if (!seen || !seen.metric) return;
    const find = at("find").value.toLowerCase().split(/\s+/).filter(Boolean), now = new Set(chosen());
    const found = clients.filter((row) => { const text = `client ${row[0]} ${row[1]} ${row[2]} ${row[8]}`.toLowerCase(); return find.every((word) => text.includes(word)); });
    found.sort(ORDERS[at("order").value] || ORDERS.number);
    if (find.length === 1) found.sort((a, b) => (String(b[0]) === find[0]) - (String(a[0]) === find[0]));
    write("metric-column", words(seen.metric.name));
    const held = document.activeElement ? document.activeElement.getAttribute("aria-label") : null;
    const body = found.slice(0, ROWS).map((row) => {
      const own = html("tr"), first = html("td"), box = html("input", {type: "checkbox", "aria-label": `curves of client ${row[0]}`});
      const label = html("label", {class: "pick"});
      box.checked = now.has(row[0]);
      box.addEventListener("change", () => choose(row[0], box.checked));
      label.append(box, row[1] ? `${row[0]} ${row[1]}` : String(row[0]));
      first.append(label);
      own.append(first, ...[row[2], shown(row[3]), shown(row[4]), shown(row[5]), bytes(row[6]), shown(row[7]), row[8]].map((text) => html("td", {}, text)));
      own.lastElementChild.className = "why";
      if (row[2] !== "present") own.children[1].className = "loss";
      return own;
    });
    at("clients").replaceChildren(...body);
    if (held && held.startsWith("curves of")) { const again = at("clients").querySelector(`[aria-label="${held}"]`); if (again) again.focus(); }
    write("count", `${Math.min(ROWS, found.length)} of ${found.length} ${find.length ? "found" : "clients"} are shown.`);
  };

  const events = (list, more) => {
    at("events").replaceChildren(...list.map((one) => {
      const row = html("tr");
      row.append(...[String(one.round), `${one.client}${one.name ? ` ${one.name}` : ""}`, one.what, one.reason].map((text) => html("td", {}, text)));
      row.lastElementChild.className = "why";
      return row;
    }));
    at("events-table").hidden = !list.length;
    write("events-count", list.length ? (more ? `${more} earlier ones are in rounds.jsonl.` : "") : "Nothing was left out, and nobody was missing.");
  };

  const ask = async (question) => {
    const answer = await fetch(question, {cache: "no-store"});
    if (!answer.ok) throw new Error(await answer.text());
    return answer.json();
  };
  const more = async () => {
    const now = chosen();
    curves = now.length ? await ask(`curves?clients=${now.join(",")}`) : {};
  };

  const tick = async () => {
    let pause = 1000;
    try {
      seen = await ask(`state?generation=${encodeURIComponent(generation)}&from=${rows.length}`);
      write("lost", "");
      at("lost").hidden = true;
      if (seen.rows) {
        generation = seen.generation;
        rows = [...rows.slice(0, seen.from), ...seen.rows];
        if (seen.clients) {
          clients = seen.clients;
          await more();
          draw();
          table();
          events(seen.events, seen.more_events);
        }
      }
      head();
      document.title = `${seen.round ?? "-"}/${seen.rounds ?? "-"} ${seen.name} – fedloom`;
      if (seen.status !== "running" || document.hidden) pause = 3000;
    } catch (error) {
      at("lost").hidden = false;
      write("lost", "The command that shows this page has ended or does not answer; what is here is what it said last. fedloom watch and the run's folder show it again.");
      pause = 3000;
    }
    setTimeout(tick, pause);
  };

  const remember = () => keep((now) => {
    for (const key of ["find", "order"]) { if (at(key).value && at(key).value !== "number") now.set(key, at(key).value); else now.delete(key); }
  });
  const recall = () => {
    at("find").value = address().get("find") || "";
    at("order").value = address().get("order") in ORDERS ? address().get("order") : "number";
  };
  recall();
  for (const key of ["find", "order"]) at(key).addEventListener("input", () => { remember(); table(); });
  addEventListener("hashchange", () => { recall(); more().then(draw).catch(() => {}); table(); });
  tick();
})();
