//! How a collective on device memory is cut.
//!
//! Its memory is *rows* of equal length: one, or one for each rank. A piece is the same columns of every row, so each piece is a
//! collective of its own, and staging is bounded whatever the message. A table gives the bytes of a piece, which is called a chunk
//! where NCCL has its parts of it too.

use smddp_core::{Collective, Error, Result};

use crate::call::DeviceCall;

/// Columns of a piece are a multiple of so many elements where as many have room, so that rows stay aligned.
pub(crate) const ALIGN: usize = 64;

/// Which rows of a piece are copied in and out, and what the operation between sees.
pub(crate) struct Rows {
    /// Of the operation.
    pub(crate) input: usize,
    pub(crate) output: usize,
    pub(crate) in_place: bool,
    /// Of the user's memory that are copied in, and out, on this rank.
    pub(crate) copied_in: usize,
    pub(crate) copied_out: usize,
}

impl Rows {
    pub(crate) fn of(call: &DeviceCall, rank: usize, size: usize) -> Rows {
        let root = call.root == rank;
        let some = |wanted: bool| usize::from(wanted);
        let (input, output, in_place) = match call.collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => (1, 1, true),
            Collective::AllGather => (1, size, false),
            Collective::ReduceScatter => (size, 1, false),
            Collective::AllToAll => (size, size, false),
            Collective::Gather => (1, size * some(root), false),
            Collective::Scatter => (size * some(root), 1, false),
            Collective::Barrier | Collective::SendRecv => (0, 0, true),
        };
        let (copied_in, copied_out) = match call.collective {
            Collective::Broadcast => (some(root), some(!root)),
            Collective::Reduce => (1, some(root)),
            _ => (input, output),
        };
        Rows { input, output, in_place, copied_in, copied_out }
    }

    /// Rows on the rank that has most of them: all ranks cut alike, whatever they hold themselves.
    pub(crate) fn most(collective: Collective, size: usize) -> usize {
        match collective {
            Collective::AllReduce | Collective::Broadcast | Collective::Reduce => 1,
            Collective::AllGather
            | Collective::ReduceScatter
            | Collective::AllToAll
            | Collective::Gather
            | Collective::Scatter => size,
            Collective::Barrier | Collective::SendRecv => 1,
        }
    }
}

/// Bytes of a rail's part of a call, at most, and of a chunk of it. A call is to have some eight chunks, so that copies, wire
/// and NCCL work at the same time, and a chunk is to take much longer than its operations' beginnings, some 50 us.
const CHUNKS: &[(usize, usize)] = &[(4 << 20, 512 << 10), (16 << 20, 1 << 20)];

/// Chunks of a larger call grow with it, so that it has about so many where slots have room: each takes a few places in its streams.
const MANY: usize = 100;
const LARGE: usize = 2 << 20;

/// Bytes of a chunk of a call of which so many are to pass one rail, where `most` fit a slot.
fn chunk(bytes: usize, most: usize) -> usize {
    let row = CHUNKS.iter().find(|(up_to, _)| bytes <= *up_to);
    most.min(row.map_or_else(|| LARGE.max(bytes.div_ceil(MANY)), |(_, chunk)| *chunk))
}

/// Columns of a piece of `rows` rows, of `total` columns, where `most` bytes are for the rows.
pub(crate) fn columns(call: &DeviceCall, (rows, total): (usize, usize), most: usize) -> Result<usize> {
    let size = call.dtype.size();
    let piece = chunk(total * rows * size, most);
    let columns = even_columns(piece / (rows * size));
    if columns * rows * size > most {
        return Err(Error::Argument {
            op: call.collective.name().to_owned(),
            argument: "SMDDP_CUDA_SLOT",
            expected: format!("room for an element of each of {rows} ranks twice"),
            given: format!("{} bytes", 2 * most),
            hint: "Raise it".to_owned(),
        });
    }
    Ok(columns)
}

/// How many columns a piece has that has room for `most`: at least one, which its caller finds too wide where it is.
fn even_columns(most: usize) -> usize {
    if most < ALIGN { most.max(1) } else { most / ALIGN * ALIGN }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_even_where_many_fit_and_as_many_as_fit_else() {
        let found: Vec<usize> = [0, 1, 32, 63, 64, 127, 128, 8200].into_iter().map(even_columns).collect();
        assert_eq!(found, [1, 1, 32, 63, 64, 64, 128, 8192]);
    }

    #[test]
    fn chunks_fit_their_slot_and_large_calls_fill_it() {
        let most = 2 << 20;
        for bytes in [0, 1, 512 << 10, 4 << 20, 16 << 20, 1 << 30] {
            assert!((1..=most).contains(&chunk(bytes, most)), "{bytes}");
            assert!(chunk(bytes, 4096) <= 4096, "{bytes}");
        }
        assert_eq!((4 << 20) / chunk(4 << 20, most), 8);
        assert_eq!(chunk(1 << 30, most), most);
        // With larger slots no call has many more than a hundred.
        for bytes in [17 << 20, 300 << 20, 1 << 30, 10 << 30] {
            let pieces = bytes / chunk(bytes, 512 << 20);
            assert!((8..=MANY).contains(&pieces), "{bytes}: {pieces}");
        }
    }
}
