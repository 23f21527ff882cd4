/** An error whose message is all that a person needs: the launcher prints it without a stack. */
export class SetupError extends Error {
  name = "SetupError";
}
