import { resolve } from "node:path";
import { parseArgs } from "node:util";
import { ConfigError, readCommand } from "../../agent/src/config.ts";

/** The command line asks for something that cannot be; the message says what can. */
export class OptionError extends Error {
  override readonly name = "OptionError";
}

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
export const startHelp = `usage: npm start -- [--once] [--data DIR] [--reset] [--gpus LIST]

Starts a control plane with its own PostgreSQL, an agent on this machine, a Docker engine where none answers, and a
first instance. Ctrl-C or SIGTERM stops the demo organization's instances that run, and then stops and removes all of
it, but for the data folder: after the next start, those instances can be started again, with their workspaces. Those
of other organizations fail.

  --once       ends once the first instance has run; the exit status says whether it did
  --data DIR   data folder, .data by default (or the variable CLODEI_DATA); another start can run beside this one
               with a folder of its own
  --reset      empties the data folder first, also of one that another version of Clodei made
  --gpus LIST  GPUs to simulate, such as 8xH100-SXM,4xL40S; "real" takes those that nvidia-smi lists and simulates
               none. By default the real ones, and 2xH100-SXM where there are none

DOCKER_HOST names an engine to use instead of the usual one; only unix:// sockets of this machine can be used.`;

const defaultSimulatedGpus = "2xH100-SXM";

/**
 * Reads and checks the command line. Returns undefined where help was asked for.
 * @throws OptionError, or the error of parseArgs for a flag that there is not.
 */
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
  const dataFolder = values.data ?? environment["CLODEI_DATA"] ?? ".data";
  if (dataFolder === "") throw new OptionError("--data: name a folder, for example --data /var/lib/clodei-demo");
  return {
    once: values.once === true,
    reset: values.reset === true,
    dataFolder: resolve(dataFolder),
    simulatedGpus: simulatedGpusOf(values.gpus, hasRealGpus),
  };
}

function simulatedGpusOf(gpus: string | undefined, hasRealGpus: () => boolean): string | undefined {
  if (gpus === undefined) return hasRealGpus() ? undefined : defaultSimulatedGpus;
  if (gpus === "real") {
    if (hasRealGpus()) return undefined;
    throw new OptionError("--gpus real: nvidia-smi lists no GPU here; leave the flag out, and two are simulated");
  }
  try {
    // The agent takes the list later, and knows what it takes.
    readCommand(["run", "--state", ".", "--simulate-gpus", gpus], {});
  } catch (error) {
    if (!(error instanceof ConfigError)) throw error;
    const message = error.message.replace("clodei-agent run: --simulate-gpus", "--gpus");
    throw new OptionError(`${message}\nFor example: npm start -- --gpus 8xH100-SXM,4xL40S`);
  }
  return gpus;
}
