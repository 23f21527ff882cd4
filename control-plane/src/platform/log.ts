// Structured logs: JSON lines on stderr. Stdout belongs to what a command prints for its user. What is secret or a
// customer's is not handed to the log in the first place; what is done here is the second line of defense.
import { destination, type Logger, pino } from "pino";

export type Log = Logger;

/** The levels that a log can have. */
export const logLevels = ["fatal", "error", "warn", "info", "debug", "trace", "silent"] as const;
export type LogLevel = (typeof logLevels)[number];

const secretFields = ["authorization", "token", "secret", "apiKey", "password", "privateKey", "cookie", "email"];
/** PostgreSQL's class of errors that quote the data they are about. */
const dataException = /^22[0-9A-Z]{3}$/;
const maxCauses = 4;

/** Makes the log of a process. */
export function createLog(
  level: LogLevel,
  stream: { write(line: string): void } = destination({ fd: 2, sync: true }),
): Log {
  return pino(
    {
      level,
      base: null,
      timestamp: pino.stdTimeFunctions.isoTime,
      formatters: { level: (label) => ({ level: label }) },
      serializers: { err: (error: unknown) => describeError(error, maxCauses) },
      redact: { paths: secretFields.flatMap((name) => [name, `*.${name}`, `*.*.${name}`]), censor: "[redacted]" },
    },
    stream,
  );
}

/**
 * Sends to the log what libraries write to the console (Connect a handler whose caller went away, grpc-js its errors),
 * which would stand between its lines. Of what they add, only an error is taken: the rest may be anybody's data.
 */
export function logConsole(log: Log): Disposable {
  const { error, warn, info, log: plain, debug } = console;
  const write = (text: unknown, ...details: readonly unknown[]): void => {
    const err = [text, ...details].find((detail) => detail instanceof Error);
    log.warn({ ...(err && { err }), source: "console" }, typeof text === "string" ? text : "a library wrote");
  };
  Object.assign(console, { error: write, warn: write, info: write, log: write, debug: write });
  return { [Symbol.dispose]: () => void Object.assign(console, { error, warn, info, log: plain, debug }) };
}

type Described = { type: string; message: string; stack?: string; code?: string; constraint?: string; cause?: unknown };

/**
 * What of an error is logged. Not all that it has: an error of the database carries the row's values in `detail`,
 * and where it is about the values themselves, in its message.
 */
function describeError(error: unknown, causes: number): Described | string {
  if (!(error instanceof Error)) return typeof error;
  const code = "code" in error && typeof error.code === "string" ? error.code : undefined;
  const constraint = "constraint" in error && typeof error.constraint === "string" ? error.constraint : undefined;
  const quotesData = code !== undefined && dataException.test(code);
  const message = quotesData ? "a data exception, whose text quotes the data" : error.message;
  const frames = error.stack?.split("\n").filter((line) => line.startsWith("    at ")) ?? [];
  return {
    type: error.name,
    message,
    ...(code === undefined ? {} : { code }),
    ...(constraint === undefined ? {} : { constraint }),
    stack: frames.join("\n"),
    ...(error.cause === undefined || causes === 0 ? {} : { cause: describeError(error.cause, causes - 1) }),
  };
}
