// Runs the program that does the work and ends with it: signals go on to it, and so does the end of our own parent.
import { spawn } from "node:child_process";
import { constants } from "node:os";

/** How often we look whether our parent still lives. */
const parentPollMs = 250;

/**
 * Calls `onGone` once the parent process has ended (SIGKILL of npm sends us nothing).
 * @param {() => void} onGone
 * @returns {() => void} stops looking
 */
export function watchParent(onGone) {
  const parent = process.ppid;
  const timer = setInterval(() => {
    if (process.ppid === parent) return;
    clearInterval(timer);
    onGone();
  }, parentPollMs);
  timer.unref();
  return () => clearInterval(timer);
}

/**
 * Runs a program with our standard streams.
 * @param {string} command
 * @param {readonly string[]} parameters
 * @param {{cwd: string, env: NodeJS.ProcessEnv}} options
 * @returns {Promise<number>} its exit status, 128 + n after signal n
 */
export function runChild(command, parameters, options) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, parameters, { ...options, stdio: "inherit" });
    /** @type {NodeJS.Signals[]} */
    const signals = ["SIGINT", "SIGTERM", "SIGHUP"];
    // On Ctrl-C the terminal tells the child as well: programs of ours take a second signal as the same wish.
    const forward = (signal) => child.kill(signal);
    for (const signal of signals) process.on(signal, forward);
    const stopWatching = watchParent(() => child.kill("SIGTERM"));
    const finish = () => {
      stopWatching();
      for (const signal of signals) process.off(signal, forward);
    };
    child.once("error", (error) => {
      finish();
      reject(error);
    });
    child.once("exit", (code, signal) => {
      finish();
      resolve(signal === null ? (code ?? 1) : 128 + constants.signals[signal]);
    });
  });
}
