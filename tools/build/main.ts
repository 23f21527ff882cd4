// `npm run build`: the agent and the control plane as JavaScript in `dist`, which is what production runs.
import { dirname } from "node:path";
import { parseArgs } from "node:util";
import { builtPrograms, buildFolder, buildPrograms } from "./programs.ts";

const scripts = Object.values(builtPrograms).map(({ name }) => `${buildFolder}/bin/${name}`);

const help = `usage: npm run build

Builds the agent and the control plane as JavaScript into ${buildFolder}: ${scripts.join(", ")}.
Beside ${buildFolder}, they need node_modules.`;

const { values } = parseArgs({ options: { help: { type: "boolean", short: "h" } } });
if (values.help === true) {
  console.log(help);
} else {
  await buildPrograms(dirname(dirname(import.meta.dirname)));
  console.log(`built: ${scripts.join(", ")}`);
}
