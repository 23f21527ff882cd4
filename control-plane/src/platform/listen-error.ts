// What keeps a listener from its address, told to whoever can change it.

/** A listener cannot listen where it is configured to. The message names the address and its settings. */
export class ListenError extends Error {
  constructor(message: string, options: { cause: unknown }) {
    super(message, options);
    this.name = "ListenError";
  }
}

const causes: Readonly<Record<string, string>> = {
  EADDRINUSE: "another process listens there",
  EACCES: "this user may not listen on this port",
  EADDRNOTAVAIL: "the address is none of this machine",
};

/**
 * Starts a listener.
 *
 * @param settings of its address, for the message.
 * @throws ListenError where the address is what fails.
 */
export async function listenAt<T>(
  address: { readonly host: string; readonly port: number; readonly settings: string },
  start: () => Promise<T>,
): Promise<T> {
  try {
    return await start();
  } catch (error) {
    const code = error instanceof Error && "code" in error ? String(error.code) : "";
    const why = causes[code];
    if (why === undefined) throw error;
    const { host, port, settings } = address;
    throw new ListenError(`cannot listen on ${host} port ${port}: ${why}; see ${settings}`, { cause: error });
  }
}
