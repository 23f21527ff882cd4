// The agent's log: JSON lines on stderr. Secrets never reach it by rule; the paths here are the second line.

import { destination, pino } from "pino";
import type { Logger } from "pino";

/** Makes the log. */
export function createLog(level: string): Logger {
  return pino(
    {
      level,
      base: { service: "clodei-agent" },
      timestamp: () => `,"time":"${new Date().toISOString()}"`,
      formatters: { level: (label) => ({ level: label }) },
      redact: {
        paths: ["token", "*.token", "env", "*.env", "sessionSecret", "*.sessionSecret", "pem", "*.pem"],
        censor: "[removed]",
      },
    },
    destination({ dest: 2, sync: true }),
  );
}
