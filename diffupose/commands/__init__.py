"""The commands of ``diffupose``, one module each: a parser, and a function that runs it."""
