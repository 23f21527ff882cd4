// What a check of the doctor found.

/** `warning`: the node works, and something will hurt later. `skipped`: it does not apply here, or cannot be told. */
export type FindingStatus = "ok" | "warning" | "failed" | "skipped";

/** One finding. */
export interface Finding {
  /** Stable, for programs: "docker", "cgroups", … */
  readonly check: string;
  readonly status: FindingStatus;
  readonly message: string;
  /** What to do; empty where nothing is. */
  readonly remedy: string;
}

/** Makes the findings of one check. */
export function findingsOf(check: string) {
  return {
    ok: (message: string): Finding => ({ check, status: "ok", message, remedy: "" }),
    skipped: (message: string): Finding => ({ check, status: "skipped", message, remedy: "" }),
    warning: (message: string, remedy: string): Finding => ({ check, status: "warning", message, remedy }),
    failed: (message: string, remedy: string): Finding => ({ check, status: "failed", message, remedy }),
  };
}

/** For a terminal: one line a finding, and what to do below it. */
export function describeFindings(findings: readonly Finding[]): string {
  const words = { ok: "ok", warning: "warning", failed: "FAILED", skipped: "skipped" } as const;
  const lines = findings.flatMap(({ check, status, message, remedy }) => [
    `${words[status].padEnd(8)} ${check.padEnd(18)} ${message}`,
    ...(remedy === "" ? [] : [`${" ".repeat(28)}→ ${remedy}`]),
  ]);
  const count = (wanted: FindingStatus) => findings.filter(({ status }) => status === wanted).length;
  const summary = `${count("failed")} failed, ${count("warning")} warnings, ${count("ok")} ok`;
  return [...lines, "", summary].join("\n");
}
