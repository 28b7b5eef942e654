// The integer codes of options; fused_attn/codes.py says what each one means, a test keeps the two together.
#pragma once

namespace fused_attn {

enum Activation {
    kIdentity = 0,
    kRelu = 1,
    kSilu = 2,
    kGelu = 3,
    kGeluTanh = 4,
    kHardSwish = 5,
    kSigmoid = 6,
    kHardSigmoid = 7,
    kTanh = 8,
    kLeakyRelu = 9,
    kRelu6 = 10,
};
enum Pool { kAvg = 0, kMax = 1, kAvgMax = 2, kBoth = 3 };
enum Ties { kFirst = 0, kEven = 1 };
enum Layer { kDense = 0, kConv = 1, kCircular = 2 };
enum Combine { kProductOf = 0, kSumOf = 1, kMaxOf = 2, kSigmoidOf = 3, kStripsOf = 4, kGateOf = 5 };
enum Selection { kSelectBySoftmax = 0, kSelectBySigmoid = 1 };

}  // namespace fused_attn
