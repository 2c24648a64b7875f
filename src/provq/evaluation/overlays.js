// Shows the overlay that the two menus name in the viewer of py2Dmol.
{
  const arms = JSON.parse(document.getElementById("overlays-data").textContent);
  const [armMenu, chainMenu, canvas, canvasContainer, distance] = [
    "arm-menu", "chain-menu", "canvas", "canvasContainer", "distance",
  ].map(name => document.getElementById(name));

  window.py2dmol_configs = { overlays: {
    display: { size: [canvasContainer.clientWidth, canvasContainer.clientHeight], controls: false, box: false },
    rendering: { width: 2, detect_cyclic: false },
    cutoffs: { protein_bond: Infinity },  // neighbours are joined, wherever a reconstruction has put them
  } };
  initializePy2DmolViewer(document.getElementById("viewer"), "overlays");
  canvasContainer.removeAttribute("style");  // the page says how large it is, and the canvas follows

  function show() {
    const arm = arms[armMenu.value], chain = arm.chains[chainMenu.value];
    const sides = [[chain.original, "--original"], [chain.reconstruction, `--line-${arm.colour}`]];
    const coords = [], chains = [], colours = {};
    for (const [trace, variable] of sides) {
      const colour = getComputedStyle(document.documentElement).getPropertyValue(variable).trim();
      trace.forEach((stretch, number) => {  // what has another name is not joined
        const name = `${variable} ${number}`;
        colours[name] = colour;
        coords.push(...stretch);
        chains.push(...stretch.map(() => name));
      });
    }
    const frame = { coords, chains, color: { type: "advanced", value: { chain: colours } } };
    window.py2dmol_viewers.overlays.handleReplaceFrame(frame, {}, "overlay");
    document.getElementById("reconstruction-colour").style.background = `var(--line-${arm.colour})`;
    distance.textContent = `${chain.name} by ${arm.name}: RMSD ${chain.rmsd} Å`;
    canvas.setAttribute("aria-label", `${chain.name} with its reconstruction by ${arm.name} laid upon it`);
  }

  armMenu.addEventListener("change", show);
  chainMenu.addEventListener("change", show);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  // The wheel belongs to the page, as long as Ctrl is not held.
  canvasContainer.addEventListener("wheel", event => event.ctrlKey || event.stopPropagation(), true);
  show();
}
