// The boot's monotonic clock, which measures how long containers ran: nobody sets it, and it means the same to the
// agent's next process. On Linux it is the one that /proc/uptime shows (CLOCK_BOOTTIME); elsewhere Node's own.

import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { hostname, uptime } from "node:os";

/** The clock of this boot. */
export interface BootClock {
  /** Names the boot: times of two boots are never compared. */
  readonly bootId: string;
  /** Milliseconds since the boot. */
  readonly nowMs: () => number;
}

/** Reads the machine's boot clock. */
export function readBootClock(): BootClock {
  const bootId = readText("/proc/sys/kernel/random/boot_id");
  if (bootId === undefined || readUptimeMs() === undefined) return portableClock();
  return {
    bootId,
    nowMs: () => readUptimeMs() ?? Math.floor(uptime() * 1000),
  };
}

function portableClock(): BootClock {
  // Minutes, because the computed time of boot moves by the drift of the wall clock.
  const bootMinute = Math.round((Date.now() / 1000 - uptime()) / 60);
  return {
    bootId: createHash("sha256").update(`${hostname()}/${bootMinute}`).digest("hex").slice(0, 32),
    nowMs: () => Math.floor(Number(process.hrtime.bigint() / 1_000_000n)),
  };
}

function readUptimeMs(): number | undefined {
  const seconds = Number.parseFloat(readText("/proc/uptime")?.split(" ")[0] ?? "");
  return Number.isFinite(seconds) ? Math.floor(seconds * 1000) : undefined;
}

function readText(path: string): string | undefined {
  try {
    return readFileSync(path, "utf8").trim();
  } catch {
    return undefined;
  }
}
