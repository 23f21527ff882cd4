/** Where a check runs. */
export type CheckContext = { readonly root: string; readonly temporaryFolder: string };

/** What one kind found: nothing, or what a person needs to mend it. */
export type Outcome = { readonly ok: true; readonly note?: string } | { readonly ok: false; readonly output: string };

/** One kind of check. */
export type Kind = {
  readonly name: string;
  readonly what: string;
  readonly run: (context: CheckContext) => Promise<Outcome>;
};
