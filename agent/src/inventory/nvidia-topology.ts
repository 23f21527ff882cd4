// Reads the table of `nvidia-smi topo -m`: how each GPU is connected to each other. Columns are separated by tabs and
// headed by names, some of them underlined by terminal codes; what follows the GPUs (network cards, CPU affinity, the
// legend) is not ours.

import { stripVTControlCharacters } from "node:util";

/** A connection of two GPUs, by the driver's numbers. */
export interface TopologyLink {
  readonly from: number;
  readonly to: number;
  readonly kind: string;
}

const maxLinks = 64 * 64;
/** Of a link: NVLinks by their number, or the way through the machine. "X" is the GPU itself. */
const linkKind = /^(NV[0-9]{1,3}|PIX|PXB|PHB|NODE|SYS|SOC|PSB)$/;

/** Parses the table. Never throws; what is no table has no links. */
export function parseTopology(table: string): TopologyLink[] {
  const rows = stripVTControlCharacters(table)
    .split("\n")
    .map((line) => line.split("\t").map((cell) => cell.trim()));
  const header = rows.findIndex((cells) => cells.some((cell) => cell === "GPU0" || gpuNumber(cell) !== undefined));
  const columns = rows[header]?.map(gpuNumber) ?? [];
  const links: TopologyLink[] = [];
  for (const [name = "", ...cells] of rows.slice(header + 1)) {
    const from = gpuNumber(name);
    if (from === undefined) continue;
    for (const [index, kind] of cells.entries()) {
      const to = columns[index + 1];
      if (to === undefined || to === from || !linkKind.test(kind)) continue;
      if (links.length < maxLinks) links.push({ from, to, kind });
    }
  }
  return links;
}

function gpuNumber(cell: string): number | undefined {
  const match = /^GPU([0-9]{1,2})$/.exec(cell);
  return match === null ? undefined : Number(match[1]);
}
