// The mask and the positions of one response, drawn on demand.

const MOST_CELLS = 640;

// Which earlier tokens a token sees: the rule of pr1_jax/layout.py. Before the response
// stands the prompt, which all see; it is not drawn.
function sees(tokens, query, key, isStructured) {
  if (key > query) return false;
  const a = tokens[query], b = tokens[key];
  return !isStructured || a.block !== b.block || a.path === b.path;
}

function maskNode(tokens, isStructured) {
  const total = tokens.length, cells = Math.min(total, MOST_CELLS);
  const canvas = el("canvas", { class: "mask", width: cells, height: cells, role: "img",
    "aria-label": `Mask of ${total} tokens: which earlier tokens each one sees` });
  const read = el("p", { class: "note", "aria-live": "polite" },
    total > cells ? `One cell stands for ${digits(total / cells, 1)} tokens.` : "\u00a0");
  const at = (cell) => Math.min(Math.floor(((cell + 0.5) * total) / cells), total - 1);
  const paint = () => {
    const context = canvas.getContext("2d", { willReadFrequently: true }), image = context.createImageData(cells, cells);
    const rgb = (name) => {
      context.fillStyle = color(name);
      context.fillRect(0, 0, 1, 1);
      return context.getImageData(0, 0, 1, 1).data;
    };
    const shared = rgb("--mask-main"), own = rgb("--mask-own"), hidden = rgb("--mask-hidden");
    for (let i = 0; i < cells; i++) {
      for (let j = 0; j <= i; j++) {
        const query = at(i), key = at(j);
        const isOwn = tokens[key].path && tokens[key].block === tokens[query].block;
        const tint = !sees(tokens, query, key, isStructured) ? hidden : isOwn ? own : shared;
        image.data.set(tint, 4 * (i * cells + j));
      }
    }
    context.putImageData(image, 0, 0);
  };
  paint();
  document.addEventListener("theme", paint);
  const where = (token) => (token.path ? `block ${token.block}, path ${token.path}` : "main stream");
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const cell = (x, size) => at(Math.min(Math.max(Math.floor((x / size) * cells), 0), cells - 1));
    const key = cell(event.clientX - box.left, box.width);
    const query = cell(event.clientY - box.top, box.height);
    if (key > query) { read.textContent = "later tokens are not seen"; return; }
    const verb = sees(tokens, query, key, isStructured) ? "sees" : "does not see";
    read.textContent = `Token ${query} (${where(tokens[query])}) ${verb} token ${key} ` +
      `(${where(tokens[key])}).`;
  });
  const keys = [["main", "sees"], ["own", "sees, in its own path"], ["hidden", "does not see"]];
  return el("figure", { class: "drawn" }, el("figcaption", {}, el("h4", {}, "Mask"),
    el("span", { class: "keys" }, ...keys.map(([name, words]) => {
      const dot = el("i", { class: "sign" });
      dot.style.background = `var(--mask-${name})`;
      return el("span", {}, dot, words);
    }))), canvas, read);
}

function positionsNode(tokens) {
  const width = 640, height = 300, pad = 46;
  const known = tokens.every((t) => t.position !== null);
  const value = (t) => (known ? t.position : t.time);
  const values = tokens.map(value), low = Math.min(...values), high = Math.max(...values);
  const x = (i) => pad + ((width - pad - 8) * i) / Math.max(tokens.length - 1, 1);
  const y = (v) => height - 24 - ((height - 36) * (v - low)) / Math.max(high - low, 1);
  const picture = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "positions", role: "img",
    "aria-label": `Positions of ${tokens.length} tokens, from ${low} to ${high}` });
  for (const v of [low, high]) {
    picture.append(svg("line", { class: "grid", x1: pad, x2: width - 8, y1: y(v), y2: y(v) }),
      svg("text", { class: "tick", x: pad - 6, y: y(v) + 4, "text-anchor": "end" }, v));
  }
  picture.append(svg("text", { class: "tick", x: width - 8, y: height - 6, "text-anchor": "end" },
    `token ${tokens.length - 1}`), svg("text", { class: "tick", x: pad, y: height - 6 }, "token 0"));
  let d = "", previous = null;
  const flush = (path) => {
    if (d) picture.append(svg("path", { d, class: path ? "in-path" : "in-main", fill: "none" }));
    d = "";
  };
  tokens.forEach((token, i) => {
    const isBreak = previous && (previous.path !== token.path || previous.block !== token.block);
    if (isBreak) flush(previous.path);
    d += `${d ? "L" : "M"}${x(i).toFixed(1)} ${y(values[i]).toFixed(1)}${d ? "" : "h1"}`;
    previous = token;
  });
  flush(previous && previous.path);
  return el("figure", { class: "drawn" }, el("figcaption", {},
    el("h4", {}, known ? "Positions" : "Sequential steps"),
    el("span", { class: "note" }, "Paths of a block start at one position.")), picture);
}
