//! The limit of open files, of which rank 0's store needs one a rank and more.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::error::{Error, Result};

/// Descriptors beyond one a rank: those without which nothing goes, and those that are better: for strangers, for threads of
/// ranks that wait, for what the program opens.
const LEAST_SPARE: u64 = 64;
const SPARE: u64 = 512;

/// Lets this process have as many files open as the store of a job of `size` ranks needs.
///
/// # Errors
/// [`Error::Descriptors`] when it may not.
pub(crate) fn allow(size: usize) -> Result<()> {
    let mut limits = getrlimit(Resource::Nofile);
    let wanted = soft_limit(size as u64, limits.current, limits.maximum)
        .map_err(|limit| Error::Descriptors { size, needed: size as u64 + LEAST_SPARE, limit })?;
    if limits.current != wanted {
        limits.current = wanted;
        if let Err(error) = setrlimit(Resource::Nofile, limits) {
            tracing::warn!("the limit of open files stays as it is: {error}");
        }
    }
    Ok(())
}

/// The soft limit to set, by the soft and the hard one (none: unlimited); the hard one where that is too low. Raised no further
/// than is of use: programs that call select() cannot have descriptors above 1023.
fn soft_limit(size: u64, soft: Option<u64>, hard: Option<u64>) -> Result<Option<u64>, u64> {
    let hard = hard.unwrap_or(u64::MAX);
    if hard < size + LEAST_SPARE {
        return Err(hard);
    }
    Ok(soft.map(|soft| soft.max(hard.min(size + SPARE))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_as_far_as_needed_and_allowed() {
        assert_eq!(soft_limit(8, Some(1024), Some(4096)), Ok(Some(1024)));
        assert_eq!(soft_limit(2000, Some(1024), Some(1 << 20)), Ok(Some(2512)));
        assert_eq!(soft_limit(2000, Some(1024), None), Ok(Some(2512)));
        assert_eq!(soft_limit(2000, Some(1024), Some(2100)), Ok(Some(2100)));
        assert_eq!(soft_limit(2000, Some(1024), Some(2063)), Err(2063));
        assert_eq!(soft_limit(2000, None, None), Ok(None));
    }
}
