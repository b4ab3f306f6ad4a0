#include "test_shared_math.cpp"
