// Rows of a matrix by index, zeros where there is none.
#include <cstring>

#include "cpu/team.h"

namespace eet_patch {
namespace cpu {
namespace EET_CPU_ARCH {

Status gather_rows(const GatherRowsArgs& args, const Context& context) {
  parallel(threads_for(args.rows * args.row_bytes / 4, context), [&](const Team& team) {
    const Range share = team.share(args.rows);
    for (int64_t row = share.begin; row < share.end; ++row) {
      char* out = static_cast<char*>(args.out) + row * args.row_bytes;
      const int64_t from = args.index[row];
      if (from < 0) {
        std::memset(out, 0, size_t(args.row_bytes));
      } else {
        std::memcpy(out, static_cast<const char*>(args.input) + from * args.row_bytes,
                    size_t(args.row_bytes));
      }
    }
  });
  return Status{};
}

}  // namespace EET_CPU_ARCH
}  // namespace cpu
}  // namespace eet_patch
