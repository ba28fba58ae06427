//! What a password's hash may cost: one that is dearer is neither made, nor imported, nor checked, since
//! one login would take a core for seconds.

pub const MAX_ARGON2_MEMORY_KIB: u32 = 256 * 1024;
pub const MAX_ARGON2_ITERATIONS: u32 = 20;
pub const MAX_BCRYPT_COST: u32 = 14;

/// Memory times passes, which is what argon2 takes time for: 1 GiB.
const MAX_ARGON2_KIB_IN_ALL: u64 = 1 << 20;

/// Whether both together are too much, though neither is alone.
pub fn argon2_is_too_costly(memory_kib: u32, iterations: u32) -> bool {
    u64::from(memory_kib) * u64::from(iterations) > MAX_ARGON2_KIB_IN_ALL
}
