import { resolve } from "node:path";
import { parseArgs } from "node:util";

/** What the command line of `npm start` asks for. */
export type StartOptions = {
  readonly once: boolean;
  readonly reset: boolean;
  /** Absolute. */
  readonly dataFolder: string;
  /** GPUs to simulate, in the agent's words (`2xH100-SXM`); undefined where real ones are to be used. */
  readonly simulatedGpus: string | undefined;
};

/** What `npm start -- --help` prints. */
export const startHelp = `usage: npm start [-- --once] [-- --data DIR] [-- --reset] [-- --gpus LIST]

Starts a control plane with its own PostgreSQL, an agent on this machine, a Docker engine where none answers, and a
first instance. Ctrl-C or SIGTERM stops and removes all of it, but for the data folder.

  --once       ends once the first instance has run; the exit status says whether it did
  --data DIR   data folder, .data by default (or the variable CLODEI_DATA); another start can run beside this one
               with a folder of its own
  --reset      empties the data folder first
  --gpus LIST  GPUs to simulate, 2xH100-SXM by default where nvidia-smi finds none; "real" forbids simulated ones

DOCKER_HOST names an engine to use instead of the usual one; only unix:// sockets of this machine can be used.`;

const defaultSimulatedGpus = "2xH100-SXM";

/** Reads the command line. Returns undefined where help was asked for; throws where it is wrong. */
export function readOptions(
  parameters: readonly string[],
  environment: NodeJS.ProcessEnv,
  hasRealGpus: () => boolean,
): StartOptions | undefined {
  const { values } = parseArgs({
    args: [...parameters],
    options: {
      help: { type: "boolean", short: "h" },
      once: { type: "boolean" },
      reset: { type: "boolean" },
      data: { type: "string" },
      gpus: { type: "string" },
    },
  });
  if (values.help === true) return undefined;
  const gpus = values.gpus ?? (hasRealGpus() ? "real" : defaultSimulatedGpus);
  return {
    once: values.once === true,
    reset: values.reset === true,
    dataFolder: resolve(values.data ?? environment["CLODEI_DATA"] ?? ".data"),
    simulatedGpus: gpus === "real" ? undefined : gpus,
  };
}
