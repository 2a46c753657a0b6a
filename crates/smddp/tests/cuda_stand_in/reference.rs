//! Calls whose result every rank can compute by itself.

use smddp::cuda::{DeviceCall, Memory};
use smddp::{Collective, DType, ReduceOp, Result};

use crate::job::{Group, Job};

pub const COLLECTIVES: [Collective; 8] = [
    Collective::AllReduce,
    Collective::ReduceScatter,
    Collective::AllGather,
    Collective::AllToAll,
    Collective::Broadcast,
    Collective::Reduce,
    Collective::Gather,
    Collective::Scatter,
];

/// What stands in outputs before: no result holds it.
const BEFORE: i64 = -77;

/// Element `i` of what rank `rank` passes; small enough to be exact in every type, sums included.
fn element(rank: usize, i: usize) -> i64 {
    ((rank + 1) * 100 + i % 89) as i64
}

fn row(rank: usize, from: usize, count: usize) -> Vec<i64> {
    (from..from + count).map(|i| element(rank, i)).collect()
}

fn bytes(dtype: DType, numbers: &[i64]) -> Vec<u8> {
    match dtype {
        DType::F32 => numbers.iter().flat_map(|&n| (n as f32).to_le_bytes()).collect(),
        DType::I64 => numbers.iter().flat_map(|&n| n.to_le_bytes()).collect(),
        other => panic!("no reference for {other}"),
    }
}

#[derive(Clone)]
pub struct Case {
    call: DeviceCall,
    input: Vec<i64>,
    /// What the output holds before the call, and after it.
    before: Vec<i64>,
    after: Vec<i64>,
    in_place: bool,
}

/// Where a case's data lies.
pub struct Placed {
    input: Memory,
    output: Memory,
}

impl Case {
    pub fn of(collective: Collective, dtype: DType, count: usize, root: usize, job: &Job) -> Case {
        let (me, n) = (job.rank(), job.size());
        let is_root = me == root;
        let mine = |blocks: usize| row(me, 0, blocks * count);
        let blank = |blocks: usize| vec![BEFORE; blocks * count];
        let sum = |from: usize, length: usize| -> Vec<i64> {
            (from..from + length).map(|i| (0..n).map(|r| element(r, i)).sum()).collect()
        };
        let all: Vec<i64> = (0..n).flat_map(|r| row(r, 0, count)).collect();
        let some = |wanted: bool, blocks: usize| if wanted { blocks } else { 0 };
        let (input, before, after, in_place) = match collective {
            Collective::AllReduce => (mine(1), mine(1), sum(0, count), true),
            Collective::Broadcast => (mine(1), mine(1), row(root, 0, count), true),
            Collective::Reduce => (mine(1), mine(1), if is_root { sum(0, count) } else { mine(1) }, true),
            Collective::ReduceScatter => (mine(n), blank(1), sum(me * count, count), false),
            Collective::AllGather => (mine(1), blank(n), all, false),
            Collective::AllToAll => {
                let swapped = (0..n).flat_map(|r| row(r, me * count, count)).collect();
                (mine(n), blank(n), swapped, false)
            }
            Collective::Gather => {
                (mine(1), blank(some(is_root, n)), if is_root { all } else { Vec::new() }, false)
            }
            Collective::Scatter => (mine(some(is_root, n)), blank(1), row(root, me * count, count), false),
            Collective::Barrier | Collective::SendRecv => panic!("{collective} moves nothing"),
        };
        Case { call: call(collective, dtype, count, root), input, before, after, in_place }
    }

    /// all_gather of `count + rank` elements from each.
    pub fn uneven_gather(count: usize, job: &Job) -> Case {
        let (me, n) = (job.rank(), job.size());
        let counts: Vec<usize> = (0..n).map(|r| count + r).collect();
        let after: Vec<i64> = (0..n).flat_map(|r| row(r, 0, count + r)).collect();
        let before = vec![BEFORE; after.len()];
        let call =
            DeviceCall { counts: Some(counts.into()), ..call(Collective::AllGather, DType::F32, 0, 0) };
        Case { call, input: row(me, 0, count + me), before, after, in_place: false }
    }

    /// all_to_all in which rank a sends `count + a + 2 b` elements to rank b.
    pub fn uneven_exchange(count: usize, job: &Job) -> Case {
        let (me, n) = (job.rank(), job.size());
        let sent = |a: usize, b: usize| count + a + 2 * b;
        let send: Vec<usize> = (0..n).map(|b| sent(me, b)).collect();
        let receive: Vec<usize> = (0..n).map(|a| sent(a, me)).collect();
        let after: Vec<i64> =
            (0..n).flat_map(|a| row(a, (0..me).map(|b| sent(a, b)).sum(), sent(a, me))).collect();
        let input = row(me, 0, send.iter().sum());
        let before = vec![BEFORE; after.len()];
        let splits = Some((send.into(), receive.into()));
        let call = DeviceCall { splits, ..call(Collective::AllToAll, DType::F32, 0, 0) };
        Case { call, input, before, after, in_place: false }
    }

    pub fn with_op(&self, op: ReduceOp) -> Case {
        Case { call: DeviceCall { op, ..self.call.clone() }, ..self.clone() }
    }

    pub fn start(&self, job: &Job, group: &Group) -> Placed {
        self.try_start(job, group).unwrap()
    }

    /// Enqueues the call behind the copies of its data.
    pub fn try_start(&self, job: &Job, group: &Group) -> Result<Placed> {
        let dtype = self.call.dtype;
        let output = job.memory(&bytes(dtype, &self.before));
        let input = if self.in_place { output } else { job.memory(&bytes(dtype, &self.input)) };
        let call = DeviceCall { input, output, ..self.call.clone() };
        // SAFETY: freed only after the stream was waited for.
        let started = unsafe { group.device.start(&call, job.stream_address(), None) };
        let placed = Placed { input, output };
        if started.is_err() {
            self.free(job, &placed);
        }
        started.map(|_| placed)
    }

    /// Compares with the reference, and frees.
    pub fn check(&self, job: &Job, placed: &Placed) {
        let found = job.read(placed.output);
        let name = format!("{} of {} {}", self.call.collective, self.call.count, self.call.dtype);
        assert!(found == bytes(self.call.dtype, &self.after), "{name} on rank {}", job.rank());
        if !self.in_place {
            assert!(
                job.read(placed.input) == bytes(self.call.dtype, &self.input),
                "the input of {name} changed"
            );
        }
        self.free(job, placed);
    }

    pub fn free(&self, job: &Job, placed: &Placed) {
        job.free(placed.output);
        if !self.in_place {
            job.free(placed.input);
        }
    }
}

fn call(collective: Collective, dtype: DType, count: usize, root: usize) -> DeviceCall {
    let none = Memory { address: 0, bytes: 0 };
    DeviceCall {
        collective,
        dtype,
        op: ReduceOp::Sum,
        root,
        count,
        input: none,
        output: none,
        counts: None,
        splits: None,
        timeout: None,
    }
}
