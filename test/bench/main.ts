// `npm run bench [NAME]`: runs one bench, or all, and prints one line of JSON a figure.
import { engineUnavailable } from "../harness/engine.ts";
import { type Figure, printFigure } from "./figures.ts";
import { benchIdle } from "./idle.ts";
import { benchStreams } from "./streams.ts";
import { benchLogs } from "./logs.ts";
import { benchStart } from "./start.ts";

const benches: Readonly<Record<string, () => Promise<Figure[]>>> = {
  start: benchStart,
  idle: benchIdle,
  streams: benchStreams,
  logs: benchLogs,
};

const help = `usage: npm run bench [-- NAME ...]

Benches: ${Object.keys(benches).join(", ")}. All of them where none is named.
Prints one line of JSON a figure; the status is 1 when a goal was missed.`;

const names = process.argv.slice(2);
const unknown = names.filter((name) => !Object.hasOwn(benches, name));
if (names.includes("--help") || names.includes("-h")) {
  console.log(help);
} else if (unknown.length > 0) {
  console.error(`no bench named ${unknown.join(", ")}\n\n${help}`);
  process.exitCode = 2;
} else if (engineUnavailable !== undefined) {
  console.error(`the benches cannot run here: ${engineUnavailable}`);
  process.exitCode = 2;
} else {
  for (const name of names.length > 0 ? names : Object.keys(benches)) {
    const figures = (await benches[name]?.()) ?? [];
    for (const figure of figures) printFigure(figure);
    if (figures.some((figure) => !figure.ok)) process.exitCode = 1;
  }
}
