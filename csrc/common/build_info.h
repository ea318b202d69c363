// What the build knows about itself, so that Python can tell a stale module from a fresh one.
#pragma once

namespace diffupose {

const char* source_hash();  // of csrc/, see diffupose/_source_hash.py
bool has_openmp();

}  // namespace diffupose
