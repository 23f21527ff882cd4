// A lock on a folder that ends with the process, however it ends: SQLite holds a lock of the kernel on the file,
// which no crash leaves behind, and which a file with a process id in it does not give.
import { DatabaseSync } from "node:sqlite";

/** Takes the lock that a file stands for, or returns undefined when another process, or this one, has it. */
export function lockFile(path: string): Disposable | undefined {
  const database = new DatabaseSync(path, { timeout: 0 });
  try {
    database.exec("pragma journal_mode = delete; begin exclusive");
  } catch (error) {
    database.close();
    if (error instanceof Error && error.message.includes("locked")) return undefined;
    throw error;
  }
  return { [Symbol.dispose]: () => database.close() };
}
