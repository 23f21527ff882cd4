// Preloaded into dependency-cruiser: the syntax visitor of @swc/core that it builds on knows no `using` and
// `await using` declarations yet and throws at one.
import visitorModule from "@swc/core/Visitor.js";

const { Visitor } = visitorModule;
const visitStatement = Visitor.prototype.visitStatement;

Visitor.prototype.visitStatement = function visitStatementOrUsing(statement) {
  if (statement.type !== "UsingDeclaration") return visitStatement.call(this, statement);
  statement.decls = this.visitVariableDeclarators(statement.decls);
  return statement;
};
