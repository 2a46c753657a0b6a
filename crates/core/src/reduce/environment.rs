//! The floating-point environment of the thread that reduces (K6).
//!
//! It belongs to the program: torch's `set_flush_denormal` flushes in the caller's thread and not in the one that makes progress,
//! and which of the two reduces a piece differs from rank to rank.

use machine::{Control, DIFFERS, control, set_control};

/// The default environment for as long as it lives: round to nearest, nothing flushed.
pub struct Plain {
    /// What to put back, if anything was changed.
    found: Option<Control>,
}

impl Plain {
    #[inline(always)]
    pub fn enter() -> Plain {
        let found = control();
        if found & DIFFERS == 0 {
            return Plain { found: None };
        }
        Plain::change(found)
    }

    #[cold]
    fn change(found: Control) -> Plain {
        set_control(found & !DIFFERS);
        Plain { found: Some(found) }
    }
}

impl Drop for Plain {
    #[inline(always)]
    fn drop(&mut self) {
        if let Some(found) = self.found {
            set_control(found);
        }
    }
}

/// MXCSR.
#[cfg(all(target_arch = "x86_64", not(miri)))]
mod machine {
    use std::arch::asm;

    pub type Control = u32;

    /// Flush to zero, the two bits of rounding, denormals are zeros.
    pub const DIFFERS: Control = 0x8000 | 0x6000 | 0x0040;

    #[inline(always)]
    pub fn control() -> Control {
        let mut control: Control = 0;
        // SAFETY: stores 4 bytes in the variable; every x86-64 has the register.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut control, options(nostack, preserves_flags)) };
        control
    }

    pub fn set_control(control: Control) {
        // SAFETY: reads 4 bytes, a value the register had with bits cleared that it may have cleared; what is computed until it
        // is put back reads and writes memory, which the compiler does not move across this.
        unsafe {
            asm!("ldmxcsr [{}]", in(reg) &raw const control, options(nostack, preserves_flags, readonly))
        };
    }
}

/// FPCR.
#[cfg(all(target_arch = "aarch64", not(miri)))]
mod machine {
    use std::arch::asm;

    pub type Control = u64;

    /// Default NaN, flush to zero, the two bits of rounding, flush halves to zero, alternate handling, flush inputs to zero.
    pub const DIFFERS: Control = 1 << 25 | 1 << 24 | 3 << 22 | 1 << 19 | 1 << 1 | 1;

    #[inline(always)]
    pub fn control() -> Control {
        let control: Control;
        // SAFETY: reads a register that every aarch64 has, and nothing else.
        unsafe { asm!("mrs {}, fpcr", out(reg) control, options(nostack, preserves_flags)) };
        control
    }

    pub fn set_control(control: Control) {
        // SAFETY: a value the register had with bits cleared that it may have cleared; what is computed until it is put back
        // reads and writes memory, which the compiler does not move across this.
        unsafe { asm!("msr fpcr, {}", in(reg) control, options(nostack, preserves_flags)) };
    }
}

/// Elsewhere it is taken for the default one.
#[cfg(any(miri, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
mod machine {
    pub type Control = u32;

    pub const DIFFERS: Control = 0;

    pub fn control() -> Control {
        0
    }

    pub fn set_control(_: Control) {}
}

/// Runs `f` as in a thread that flushes subnormals and rounds toward zero, where that can be set; nothing of it may be
/// floating-point arithmetic of its own.
#[cfg(test)]
pub fn in_another<R>(f: impl FnOnce() -> R) -> R {
    let found = control();
    set_control(found | DIFFERS);
    let result = f();
    let left = control() & DIFFERS;
    set_control(found);
    assert_eq!(left, DIFFERS, "the caller's environment was not put back");
    result
}
