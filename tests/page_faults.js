// What is wrong in a page as the browser has laid it out, as a list of sentences.
(() => {
  const faults = [];
  const say = (text) => { if (faults.length < 40 && !faults.includes(text)) faults.push(text); };
  const words = (node) => (node.textContent || "").trim().replace(/\s+/g, " ").slice(0, 40);

  // Nothing is wider than the window, but what scrolls in a box of its own.
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) say(`the page is ${document.documentElement.scrollWidth} wide`);
  const boxed = (node) => node.closest(".scroll, pre, .wide");
  for (const node of document.body.querySelectorAll("*")) {
    if (!node.getClientRects().length || boxed(node)) continue;
    const box = node.getBoundingClientRect();
    if (box.right > width + 1 || box.left < -1) say(`${node.tagName} reaches beyond the window: ${words(node)}`);
  }
  // A table needs no scrolling in a wide window, and keeps its first column in a narrow one.
  for (const node of document.querySelectorAll(".scroll")) {
    if (node.scrollWidth <= node.clientWidth + 1 || !node.clientWidth) continue;
    if (width >= 1280) say(`a table is ${node.scrollWidth} wide in a box of ${node.clientWidth}: ${words(node)}`);
    const first = node.querySelector("tr:last-child > :first-child");
    if (getComputedStyle(first).position !== "sticky") say(`the first column scrolls away: ${words(node)}`);
  }

  // Colours: text against what lies behind it (WCAG 2.2: 4.5 to 1, large text 3 to 1).
  const parse = (text) => { const m = text.match(/[\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const light = (c) => { const [r, g, b] = c.map((v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((m, n) => n - m); return (x + 0.05) / (y + 0.05); };
  const behind = (node) => {
    for (let own = node; own; own = own.parentElement) {
      const colour = parse(getComputedStyle(own).backgroundColor);
      if (colour[3] > 0.5) return colour;
    }
    return [255, 255, 255, 1];
  };
  for (const node of document.body.querySelectorAll("*")) {
    if (!node.getClientRects().length || ["SCRIPT", "STYLE"].includes(node.tagName)) continue;
    if (![...node.childNodes].some((own) => own.nodeType === 3 && own.textContent.trim())) continue;
    const style = getComputedStyle(node);
    const colour = node.closest("svg") ? style.fill : style.color;
    if (!colour.startsWith("rgb")) continue;
    const needed = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
    const found = ratio(parse(colour).slice(0, 3), behind(node).slice(0, 3));
    if (found < needed) say(`contrast ${found.toFixed(1)} of ${words(node)}`);
  }
  // Marks of a chart against its card: 3 to 1.
  const seen = new Set();
  for (const node of document.querySelectorAll("figure svg [style*='--c']")) {
    const style = getComputedStyle(node);
    for (const kind of ["stroke", "fill"]) {
      const colour = style[kind];
      if (!new RegExp(kind + ": var").test(node.getAttribute("style"))) continue;
      if (!colour.startsWith("rgb") || seen.has(colour) || parse(colour)[3] < 0.5) continue;
      seen.add(colour);
      const found = ratio(parse(colour).slice(0, 3), behind(node).slice(0, 3));
      if (found < 3) say(`contrast ${found.toFixed(1)} of the mark ${colour}`);
    }
  }

  // Charts: the legend stands off the data, and no text lies on another or is cut off.
  const cross = (a, b, by) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > by && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > by;
  for (const svg of document.querySelectorAll("figure svg")) {
    if (!svg.getClientRects().length) continue;
    const title = words(svg.closest("figure").querySelector("figcaption") || svg);
    const frame = svg.getBoundingClientRect();
    const texts = [...svg.querySelectorAll("text")].filter((own) => own.getClientRects().length);
    texts.forEach((one, place) => {
      const box = one.getBoundingClientRect();
      if (box.left < frame.left - 2 || box.right > frame.right + 2 || box.top < frame.top - 2 || box.bottom > frame.bottom + 2) say(`${title}: cut off: ${words(one)}`);
      for (const other of texts.slice(place + 1)) {
        if (cross(box, other.getBoundingClientRect(), 2)) say(`${title}: ${words(one)} lies on ${words(other)}`);
      }
    });
    const legend = svg.querySelector("[id^=legend]");
    const patch = svg.querySelector("[id^=axes] > [id^=patch_2], [id^=axes] > [id^=patch]");
    if (legend && patch && cross(legend.getBoundingClientRect(), patch.getBoundingClientRect(), 1)) say(`${title}: the legend lies on the data`);
  }

  // No row of charts leaves half of the page empty.
  for (const grid of document.querySelectorAll(".grid")) {
    if (!grid.getClientRects().length || width < 1280) continue;
    const boxes = [...grid.children].map((own) => own.getBoundingClientRect());
    const area = grid.getBoundingClientRect();
    const full = boxes.reduce((sum, own) => sum + own.width * own.height, 0);
    if (full < 0.5 * area.width * area.height) say(`charts fill ${(100 * full / area.width / area.height).toFixed(0)} % of their place`);
  }
  return faults;
})()
