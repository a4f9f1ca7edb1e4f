#pragma once
#include "ptxsim/ptxsim.h"
