// Charts that are explored: values under the pointer, ranges, a choice of lines, SVG and CSV, a link to what is shown.
// The drawn picture of a page stays for paper, and for readers without scripts.
const charts = (() => {
  "use strict";
  const WIDTH = 440, SIZE = 13, MOST = 12, COLOURS = 8;
  const all = [];
  const svg = (name, attributes, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const html = (name, attributes, text) => {
    const node = document.createElement(name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const button = (text, act) => {
    const node = html("button", {type: "button"}, text);
    node.addEventListener("click", act);
    return node;
  };
  const shown = (value) => {
    if (value === null || value === undefined) return "-";
    if (Number.isInteger(value)) return value.toLocaleString("en").replace(/,/g, "\u202f");
    return Math.abs(value) >= 1e4 || Math.abs(value) < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  };
  const cut = (text, most) => text.length <= most ? text : text.slice(0, most - 1) + "…";

  // What is shown, in the address: the same address shows the same again.
  const state = () => new URLSearchParams(location.hash.slice(1));
  const keep = (change) => {
    const now = state();
    change(now);
    const text = now.toString();
    history.replaceState(null, "", text ? "#" + text : location.pathname + location.search);
  };
  const hidden = () => new Set(state().getAll("hide"));
  const hide = (name) => {
    const names = hidden();
    if (!names.delete(name)) names.add(name);
    keep((now) => { now.delete("hide"); names.forEach((own) => now.append("hide", own)); });
    all.forEach((chart) => chart.draw());
  };

  const save = (name, type, text) => {
    const link = html("a", {download: name, href: URL.createObjectURL(new Blob([text], {type}))});
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  };
  const cell = (value) => {
    if (value === null || value === undefined) return "";
    let text = String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text; // no formula in a spreadsheet
    return /[",\r\n]/.test(text) ? '"' + text.replace(/"/g, '""') + '"' : text;
  };
  const csv = (spec) => {
    if (spec.table) return [spec.table.columns, ...spec.table.rows].map((row) => row.map(cell).join(",") + "\r\n").join("");
    const of = (axis, value) => axis.names ? axis.names[value] : value;
    const rows = [["line", spec.x.label || "x", spec.y.label || "y", "low", "high"]];
    for (const line of spec.lines) {
      line.x.forEach((x, place) => {
        const at = (list) => list ? list[place] : null;
        rows.push([line.name, of(spec.x, x), line.y ? of(spec.y, line.y[place]) : null, at(line.low), at(line.high)]);
      });
    }
    return rows.map((row) => row.map(cell).join(",") + "\r\n").join("");
  };
  const picture = (node, title, lines) => {
    const [, , width, height] = node.getAttribute("viewBox").split(/[ ,]+/).map(Number);
    const copy = node.cloneNode(true), size = width * SIZE / WIDTH, step = size * 1.5;
    const from = [node, ...node.querySelectorAll("*")], to = [copy, ...copy.querySelectorAll("*")];
    from.forEach((own, place) => {
      const style = getComputedStyle(own);
      for (const key of ["fill", "stroke", "color"]) to[place].style[key] = style[key];
    });
    const tall = height + step * (lines.length + 2);
    copy.removeAttribute("class");
    for (const key of ["max-width", "min-width"]) copy.style.removeProperty(key);
    copy.setAttribute("viewBox", `0 ${-step} ${width} ${tall}`);
    copy.setAttribute("width", width);
    copy.setAttribute("height", tall);
    const card = getComputedStyle(node.closest("figure") || document.body), ink = card.color;
    copy.prepend(svg("rect", {x: 0, y: -step, width, height: tall, fill: card.backgroundColor}));
    const words = (text, x, y, weight) => copy.append(svg("text", {x, y, fill: ink, "font-size": size, "font-family": "sans-serif", "font-weight": weight}, text));
    words(cut(title, 62), 4, 0, "bold");
    lines.forEach(([name, colour], place) => {
      const y = height + step * (place + 0.8);
      copy.append(svg("rect", {x: 4, y: y - size * 0.8, width: size, height: size * 0.8, fill: colour}));
      words(name, 10 + size, y, "normal");
    });
    return new XMLSerializer().serializeToString(copy);
  };

  const ticks = (low, high, log, many) => {
    const found = [];
    if (log) {
      const decades = Math.log10(high / low);
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
        for (const times of decades < 1 ? [1, 2, 3, 5] : decades < 3 ? [1, 3] : [1]) {
          const value = times * 10 ** power;
          if (value >= low && value <= high) found.push(value);
        }
      }
      return found;
    }
    const raw = (high - low) / many, base = 10 ** Math.floor(Math.log10(raw));
    const step = base * [1, 2, 5, 10].find((times) => times * base >= raw * 0.999);
    for (let place = Math.ceil(low / step - 1e-9); place * step <= high + step * 1e-9 && found.length < 100; place++) found.push(Number((place * step).toPrecision(12)));
    return found;
  };

  class Chart {
    constructor(figure, spec, title) {
      this.figure = figure;
      this.title = title;
      const slug = title.toLowerCase().replace(/[^a-z0-9]+/g, "-").replace(/^-|-$/g, "").slice(0, 40) || "chart";
      const same = all.filter((own) => own.slug.replace(/~\d+$/, "") === slug).length;
      this.slug = same ? `${slug}~${same + 1}` : slug;
      this.at = null;
      this.paper = figure.querySelector("svg");
      if (this.paper) this.paper.classList.add("paper");
      this.tools = html("div", {class: "tools"});
      if (!spec.table) this.frame();
      this.figure.append(this.tools);
      this.download();
      all.push(this);
      this.update(spec);
    }

    frame() {
      this.picture = svg("svg", {class: "drawn", role: "img"});
      this.figure.classList.add("explored");
      this.slide = html("input", {type: "range", min: 0, step: 1, "aria-label": `read values of: ${this.title}`});
      this.slide.addEventListener("input", () => this.read(Number(this.slide.value)));
      this.values = html("output", {class: "values"});
      this.keys = html("div", {class: "keys"});
      this.find = html("input", {type: "search", placeholder: "choose", "aria-label": `find lines of: ${this.title}`});
      this.find.addEventListener("input", () => this.legend());
      if (this.paper) this.paper.after(this.picture);
      else this.figure.append(this.picture);
      this.tools.append(this.slide, this.values, this.keys);
      this.picture.addEventListener("pointermove", (event) => this.pointed(event));
      this.picture.addEventListener("pointerdown", (event) => {
        this.begun = event.pointerType === "mouse" ? this.place(event) : null;
        this.pointed(event);
      });
      this.picture.addEventListener("pointerup", (event) => this.released(event));
      this.picture.addEventListener("dblclick", () => this.range(null, null));
    }

    download() {
      const more = html("details"), row = html("div", {class: "row"});
      more.append(html("summary", {}, this.picture ? "Range, download" : "Download"), row);
      if (this.picture) {
        const field = (words) => {
          const label = html("label", {}, words + " "), input = html("input", {type: "number", step: "any"});
          input.addEventListener("change", () => this.range(...this.ends.map((own) => own.value === "" ? null : Number(own.value))));
          label.append(input);
          row.append(label);
          return input;
        };
        this.ends = [field("from"), field("to")];
        row.append(button("All", () => this.range(null, null)));
      }
      const name = `${document.title.replace(/[^\w.-]+/g, "-")}-${this.slug}`;
      row.append(button("SVG", () => save(name + ".svg", "image/svg+xml", this.asPicture())));
      row.append(button("CSV", () => save(name + ".csv", "text/csv", csv(this.spec))));
      const link = button("Copy link", () => {
        const copied = navigator.clipboard ? navigator.clipboard.writeText(location.href) : Promise.reject();
        copied.then(() => { link.textContent = "Copied"; }, () => { link.textContent = "The address has it"; });
      });
      row.append(link);
      this.tools.append(more);
    }

    asPicture() {
      if (!this.picture) return picture(this.paper, this.title, []);
      const colours = getComputedStyle(document.documentElement);
      const lines = this.lines().filter((line) => line.name).map((line) => [line.name, colours.getPropertyValue(`--c${line.colour % COLOURS}`)]);
      return picture(this.picture, this.title, lines);
    }

    update(spec) {
      this.spec = spec;
      if (!this.picture) return;
      spec.lines.forEach((line, place) => { line.colour = line.colour ?? place; });
      this.legend();
      this.draw();
    }

    lines() {
      const names = hidden();
      return this.spec.lines.filter((line) => !names.has(line.name));
    }

    legend() {
      const named = this.spec.lines.filter((line) => line.name), many = named.length > MOST;
      const text = this.find.value.toLowerCase();
      const kept = named.filter((line) => !many || line.name.toLowerCase().includes(text)).slice(0, MOST);
      const buttons = named.length < 2 ? [] : kept.map((line) => {
        const key = button("", () => hide(line.name)), colour = html("i");
        colour.style.background = `var(--c${line.colour % COLOURS})`;
        key.append(colour, line.name);
        key.dataset.name = line.name;
        return key;
      });
      const held = document.activeElement && this.keys.contains(document.activeElement) ? document.activeElement.dataset.name : null;
      this.keys.replaceChildren(...buttons);
      if (held) { const again = buttons.find((key) => key.dataset.name === held); if (again) again.focus(); }
      if (many && !this.find.isConnected) this.keys.before(this.find);
      if (!many) this.find.remove();
      this.mark();
    }

    mark() {
      const names = hidden();
      for (const key of this.keys.children) key.setAttribute("aria-pressed", String(!names.has(key.dataset.name)));
    }

    range(from, to) {
      const ends = from !== null && to !== null && from > to ? [to, from] : [from, to];
      keep((now) => ["from", "to"].forEach((key, place) => {
        const value = ends[place];
        if (value === null || Number.isNaN(value)) now.delete(`${key}.${this.slug}`);
        else now.set(`${key}.${this.slug}`, value);
      }));
      this.at = null;
      this.draw();
    }

    // The ends of an axis: of what lies in the range, with some room.
    extent(values, axis, room) {
      if (axis.names) return [-0.5, axis.names.length - 0.5];
      if (axis.limits) return axis.limits;
      let low = Infinity, high = -Infinity;
      for (const value of values) if (value !== null && Number.isFinite(value)) { low = Math.min(low, value); high = Math.max(high, value); }
      if (low > high) return [0, 1];
      if (axis.log) return low > 0 ? [low / 1.3, high * 1.3] : [0.1, 1];
      const pad = low === high ? Math.abs(low) * 0.1 || 0.5 : (high - low) * room;
      return [low - pad, high + pad];
    }

    scales() {
      const {x, y} = this.spec, lines = this.lines(), now = state();
      const across = (line) => line.across && line.low ? [...line.x, ...line.low, ...line.high] : line.x;
      const [low, high] = this.extent(lines.flatMap(across), x, lines.some((line) => line.points) ? 0.06 : 0.02);
      const given = ["from", "to"].map((key) => now.get(`${key}.${this.slug}`));
      const [from, to] = [low, high].map((end, place) => given[place] !== null && Number.isFinite(Number(given[place])) && !(x.log && Number(given[place]) <= 0) ? Number(given[place]) : end);
      this.xs = from < to ? [from, to] : [low, high];
      const inside = (value) => value >= this.xs[0] && value <= this.xs[1];
      const seen = lines.flatMap((line) => line.x.flatMap((value, place) => !inside(value) ? [] : [
        ...(line.y ? [line.y[place]] : []), ...(line.low && !line.across ? [line.low[place], line.high[place]] : [])]));
      this.ys = this.extent(seen, y, 0.06);
      if (this.ends) this.ends.forEach((input, place) => { if (document.activeElement !== input) input.value = given[place] ?? ""; });
    }

    draw() {
      if (!this.picture) return;
      this.scales();
      this.mark();
      const {x, y} = this.spec, most = 24;
      const marks = y.names ? y.names.map((name, place) => [place, cut(name, most)]) : ticks(...this.ys, y.log, 5).map((value) => [value, shown(value)]);
      const left = Math.min(180, Math.max(...marks.map(([, text]) => text.length), 2) * SIZE * 0.58 + 10) + (y.label ? SIZE + 8 : 4);
      const height = y.names ? Math.max(160, 70 + 19 * y.names.length) : 270;
      const box = {left, right: WIDTH - 14, top: 12, bottom: height - 40};
      this.box = box;
      this.picture.setAttribute("viewBox", `0 0 ${WIDTH} ${height}`);
      this.picture.setAttribute("aria-label", `${this.title}: ${this.lines().map((line) => line.name).filter(Boolean).join(", ") || "one line"}`);
      const axes = svg("g", {"font-size": SIZE, fill: "currentColor"});
      const grid = {stroke: "currentColor", "stroke-opacity": 0.15};
      const every = y.names ? Math.ceil(y.names.length / 60) : 1;
      for (const [value, text] of marks) {
        const at = this.down(value);
        if (!y.names) axes.append(svg("line", {x1: box.left, x2: box.right, y1: at, y2: at, ...grid}));
        if (!y.names || value % every === 0) axes.append(svg("text", {x: box.left - 6, y: at + SIZE * 0.35, "text-anchor": "end"}, text));
      }
      let last = -Infinity;
      for (const value of ticks(...this.xs, x.log, 6)) {
        if (x.label === "round" && !Number.isInteger(value)) continue;
        const at = this.across(value), text = shown(value), half = text.length * SIZE * 0.3;
        axes.append(svg("line", {x1: at, x2: at, y1: box.top, y2: box.bottom, ...grid}));
        if (at - half < last || at + half > WIDTH) continue;
        axes.append(svg("text", {x: at, y: box.bottom + SIZE + 4, "text-anchor": "middle"}, text));
        last = at + half + 6;
      }
      axes.append(svg("path", {d: `M${box.left} ${box.top}V${box.bottom}H${box.right}`, fill: "none", stroke: "currentColor", "stroke-opacity": 0.6}));
      axes.append(svg("text", {x: (box.left + box.right) / 2, y: height - 5, "text-anchor": "middle"}, cut(x.label, 52)));
      if (y.label) axes.append(svg("text", {transform: `translate(${SIZE} ${(box.top + box.bottom) / 2}) rotate(-90)`, "text-anchor": "middle"}, cut(y.label, 32)));
      const clip = `clip-${all.indexOf(this) < 0 ? all.length : all.indexOf(this)}`, region = svg("clipPath", {id: clip});
      region.append(svg("rect", {x: box.left - 5, y: box.top - 5, width: box.right - box.left + 10, height: box.bottom - box.top + 10}));
      const data = svg("g", {"clip-path": `url(#${clip})`});
      this.paths = [];
      this.lines().forEach((line) => this.one(line, data));
      this.cursor = svg("g");
      this.picture.replaceChildren(region, axes, data, this.cursor);
      this.stops();
    }

    across(value) {
      const [low, high] = this.spec.x.log ? this.xs.map(Math.log) : this.xs;
      return this.box.left + ((this.spec.x.log ? Math.log(value) : value) - low) / (high - low) * (this.box.right - this.box.left);
    }

    down(value) {
      const part = (value - this.ys[0]) / (this.ys[1] - this.ys[0]);
      return this.spec.y.names ? this.box.top + part * (this.box.bottom - this.box.top) : this.box.bottom - part * (this.box.bottom - this.box.top);
    }

    one(line, data) {
      const colour = `var(--c${line.colour % COLOURS})`, dash = line.dashed ? "6 4" : ["", "7 3", "2 3"][Math.floor(line.colour / COLOURS) % 3];
      const paint = (node, keys) => { keys.forEach((key) => { node.style[key] = colour; }); data.append(node); return node; };
      const at = line.x.map((x, place) => [this.across(x), line.y && line.y[place] !== null ? this.down(line.y[place]) : null, place]);
      if (line.low && !line.points) {
        const known = at.filter(([, , place]) => line.low[place] !== null && line.high[place] !== null);
        const edge = (list) => known.map(([x, , place]) => `${x} ${this.down(list[place])}`);
        if (known.length) paint(svg("path", {d: `M${[...edge(line.low), ...edge(line.high).reverse()].join("L")}Z`, "fill-opacity": 0.15}), ["fill"]);
      }
      const kept = at.filter(([, y]) => y !== null);
      if (!line.points && kept.length > 1) {
        const below = this.paths.some((other) => kept.every(([x, y]) => Math.abs((other.get(x) ?? Infinity) - y) < 2)); // that one shows between dashes
        paint(svg("path", {d: `M${kept.map(([x, y]) => `${x} ${y}`).join("L")}`, fill: "none", "stroke-width": 2, "stroke-dasharray": below ? "6 6" : dash}), ["stroke"]);
        this.paths.push(new Map(kept));
      }
      if (line.points || kept.length <= 30) {
        for (const [x, y, place] of kept) {
          if (line.points && line.low && line.low[place] !== null) {
            const [a, b] = [line.low[place], line.high[place]];
            const ends = line.across ? {x1: this.across(a), x2: this.across(b), y1: y, y2: y} : {x1: x, x2: x, y1: this.down(a), y2: this.down(b)};
            paint(svg("line", {...ends, "stroke-width": 2, "stroke-opacity": 0.6}), ["stroke"]);
          }
          paint(svg("circle", {cx: x, cy: y, r: line.points ? 4.5 : 2.6}), ["fill"]);
        }
      }
    }

    // Where values are read: each x of lines, each row of a chart with names, each single point.
    stops() {
      const found = new Map(), {x, y} = this.spec;
      const single = !y.names && this.lines().every((line) => line.points || line.dashed);
      for (const line of this.lines()) {
        line.x.forEach((own, place) => {
          if (own < this.xs[0] || own > this.xs[1]) return;
          const value = line.y ? line.y[place] : null, low = line.low ? line.low[place] : null;
          if (value === null && low === null) return;
          const key = single ? `${line.name}/${place}` : y.names ? value : own;
          if (!found.has(key)) found.set(key, {key, at: own, y: value, words: []});
          const ends = low !== null && low !== undefined ? `${shown(low)} to ${shown(line.high[place])}` : "";
          const band = ends && value !== null ? ` (${ends})` : ends;
          const what = y.names ? shown(own) : value === null ? "" : shown(value);
          const where = single ? `${x.label || "x"} ${shown(own)}, ${y.label || "y"} ` : "";
          found.get(key).words.push(`${line.name ? line.name + ": " : ""}${where}${what}${band}`.trim());
        });
      }
      this.found = [...found.values()].sort((a, b) => y.names ? a.y - b.y : a.at - b.at);
      this.slide.max = Math.max(0, this.found.length - 1);
      this.slide.disabled = this.found.length === 0;
      this.read(this.at === null ? this.found.length - 1 : Math.min(this.at, this.found.length - 1), this.at === null);
    }

    read(place, resting) {
      const stop = this.found[place], {x, y} = this.spec;
      this.at = resting || place === this.found.length - 1 ? null : place;
      this.slide.value = place;
      this.cursor.replaceChildren();
      if (!stop) { this.values.textContent = "nothing in this range"; return; }
      const title = y.names ? y.names[stop.y] : this.spec.y && typeof stop.key === "number" ? `${x.label} ${shown(stop.at)}` : "";
      const words = stop.words.slice(0, MOST), more = stop.words.length - words.length;
      const text = `${title ? title + " – " : ""}${words.join("; ")}${more > 0 ? `; and ${more} more` : ""}`;
      this.values.textContent = text;
      this.slide.setAttribute("aria-valuetext", text);
      if (resting) return;
      const line = y.names ? {x1: this.box.left, x2: this.box.right, y1: this.down(stop.y), y2: this.down(stop.y)} : {x1: this.across(stop.at), x2: this.across(stop.at), y1: this.box.top, y2: this.box.bottom};
      this.cursor.append(svg("line", {...line, stroke: "currentColor", "stroke-dasharray": "3 3"}));
      if (typeof stop.key === "string") this.cursor.append(svg("circle", {cx: this.across(stop.at), cy: this.down(stop.y), r: 8, fill: "none", stroke: "currentColor"}));
    }

    place(event) {
      const frame = this.picture.getBoundingClientRect(), scale = WIDTH / frame.width;
      return {x: (event.clientX - frame.left) * scale, y: (event.clientY - frame.top) * scale};
    }

    pointed(event) {
      const spot = this.place(event);
      if (this.begun && event.buttons && Math.abs(spot.x - this.begun.x) > 8) {
        const [a, b] = [this.begun.x, spot.x].map((own) => Math.min(this.box.right, Math.max(this.box.left, own))).sort((m, n) => m - n);
        this.cursor.replaceChildren(svg("rect", {x: a, y: this.box.top, width: b - a, height: this.box.bottom - this.box.top, fill: "currentColor", "fill-opacity": 0.12}));
        return;
      }
      let best = -1, least = Infinity;
      this.found.forEach((stop, place) => {
        const dx = this.across(stop.at) - spot.x, dy = stop.y === null ? 0 : this.down(stop.y) - spot.y;
        const far = this.spec.y.names ? Math.abs(dy) : typeof stop.key === "string" ? Math.hypot(dx, dy) : Math.abs(dx);
        if (far < least) { least = far; best = place; }
      });
      if (best >= 0) this.read(best);
    }

    released(event) {
      const spot = this.place(event), begun = this.begun;
      this.begun = null;
      if (!begun || Math.abs(spot.x - begun.x) <= 8) return;
      const value = (own) => {
        const part = (Math.min(this.box.right, Math.max(this.box.left, own)) - this.box.left) / (this.box.right - this.box.left);
        const [low, high] = this.spec.x.log ? this.xs.map(Math.log) : this.xs, found = low + part * (high - low);
        return Number((this.spec.x.log ? Math.exp(found) : found).toPrecision(4));
      };
      this.range(value(begun.x), value(spot.x));
    }
  }

  // What scrolls is reached by keyboard, and what does not is no stop on the way.
  const reach = () => {
    for (const box of document.querySelectorAll(".scroll, figure.wide, pre")) {
      if (box.scrollWidth > box.clientWidth + 1 || box.scrollHeight > box.clientHeight + 1) {
        const first = box.querySelector("th, figcaption");
        box.tabIndex = 0;
        box.setAttribute("role", "region");
        box.setAttribute("aria-label", `scrolls: ${first ? first.textContent : box.textContent.slice(0, 30)}`);
      } else if (box.getClientRects().length) ["tabindex", "role", "aria-label"].forEach((name) => box.removeAttribute(name));
    }
  };
  const explore = () => {
    reach();
    addEventListener("resize", reach);
    document.addEventListener("toggle", reach, true);
    for (const numbers of document.querySelectorAll("figure svg > metadata[data-numbers]")) {
      const figure = numbers.closest("figure"), caption = figure.querySelector("figcaption");
      const heading = () => { let own = figure; while (own && own.tagName !== "H2") own = own.previousElementSibling || own.parentElement; return own ? own.textContent : "chart"; };
      new Chart(figure, JSON.parse(numbers.textContent), caption ? caption.textContent : heading());
    }
  };
  addEventListener("hashchange", () => all.forEach((chart) => chart.draw()));
  return {Chart, explore, state, keep, html, button, shown, all};
})();
