// The end of a container that nobody knows. An engine that is killed after it took a container's end over from
// containerd, and before it wrote that down, finds nothing about it when it is back: it then says 255, which a program
// may also end with, and its own time of that moment. Only that moment tells the two apart.
import { readdirSync, readFileSync } from "node:fs";

/** What an engine says of an end that it does not know. */
const unknownExitCode = 255;
/** An engine looks after its containers in the first seconds of its life; in them a true 255 is taken for a lost one. */
const restoreMs = 15_000;
/** The kernel tells the time of its boot in seconds. */
const slackMs = 1500;
/** Of the kernel's clock in /proc, on every architecture that Linux shows it to programs. */
const ticksPerSecond = 100;

/** Whether the engine says how the container ended without knowing it. */
export function isEndLost(
  exitCode: number,
  finishTime: Date | undefined,
  starts: () => Date[] = engineStarts,
): boolean {
  if (exitCode !== unknownExitCode || finishTime === undefined) return false;
  const sinceMs = (start: Date): number => finishTime.getTime() - start.getTime();
  return starts().some((start) => sinceMs(start) >= -slackMs && sinceMs(start) <= restoreMs);
}

/** When the engines of this machine were started: which of them has the agent's socket is not to be seen from here. */
function engineStarts(): Date[] {
  const bootSeconds = Number(/^btime (\d+)$/m.exec(readFileSync("/proc/stat", "latin1"))?.[1]);
  return readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .map((pid) => readStat(pid))
    .filter((stat) => stat.includes("(dockerd)"))
    .map((stat) => {
      // The 22nd field; the 2nd, a name in brackets, may hold blanks.
      const ticks = Number(stat.slice(stat.lastIndexOf(")") + 2).split(" ")[19]);
      return new Date((bootSeconds + ticks / ticksPerSecond) * 1000);
    });
}

function readStat(pid: string): string {
  try {
    return readFileSync(`/proc/${pid}/stat`, "latin1");
  } catch {
    // It has ended.
    return "";
  }
}
