//! Calls whose result every rank can compute by itself.

use smddp::cuda::{DeviceCall, Memory};
use smddp::{Collective, DType, ReduceOp, Result, StartedOnDevice};

use crate::job::{Group, Job};

/// What stands in outputs before: no result holds it.
const BEFORE: i64 = -77;

/// Element `i` of what rank `rank` passes; small enough to be exact in every type of 32 bits or more, sums included.
fn element(rank: usize, i: usize) -> i64 {
    ((rank + 1) * 100 + i % 89) as i64
}

/// As [`element`], for a type and a reduction over up to 4 ranks whose result the type holds exactly.
fn small(dtype: DType, op: ReduceOp, rank: usize, i: usize) -> i64 {
    match (dtype, op) {
        (DType::Bool, _) => i64::from((rank + i).is_multiple_of(3)),
        // Means of 4 are whole.
        (_, ReduceOp::Avg) => 4 * (1 + (rank + i) % 3) as i64,
        _ => (1 + (rank + i) % 3) as i64,
    }
}

fn reduced(dtype: DType, op: ReduceOp, values: &[i64]) -> i64 {
    let it = values.iter().copied();
    let whole = match op {
        ReduceOp::Sum => it.sum(),
        ReduceOp::Avg => it.sum::<i64>() / values.len() as i64,
        ReduceOp::Product => it.product(),
        ReduceOp::Min => it.min().unwrap_or(0),
        ReduceOp::Max => it.max().unwrap_or(0),
        ReduceOp::BitAnd => it.fold(-1, |a, b| a & b),
        ReduceOp::BitOr => it.fold(0, |a, b| a | b),
        ReduceOp::BitXor => it.fold(0, |a, b| a ^ b),
    };
    if dtype == DType::Bool { whole.min(1) } else { whole }
}

fn row(rank: usize, from: usize, count: usize) -> Vec<i64> {
    (from..from + count).map(|i| element(rank, i)).collect()
}

fn bytes(dtype: DType, numbers: &[i64]) -> Vec<u8> {
    fn all<const N: usize>(numbers: &[i64], one: impl Fn(i64) -> [u8; N]) -> Vec<u8> {
        numbers.iter().flat_map(|&n| one(n)).collect()
    }
    match dtype {
        DType::Bool | DType::U8 | DType::I8 => all(numbers, |n| [n as u8]),
        DType::I16 => all(numbers, |n| (n as i16).to_le_bytes()),
        DType::I32 => all(numbers, |n| (n as i32).to_le_bytes()),
        DType::I64 => all(numbers, i64::to_le_bytes),
        DType::F16 => all(numbers, |n| half::f16::from_f64(n as f64).to_le_bytes()),
        DType::BF16 => all(numbers, |n| half::bf16::from_f64(n as f64).to_le_bytes()),
        DType::F32 => all(numbers, |n| (n as f32).to_le_bytes()),
        DType::F64 => all(numbers, |n| (n as f64).to_le_bytes()),
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
    pub input: Memory,
    pub output: Memory,
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

    /// all_reduce, or reduce_scatter, by any operation of any type on up to 4 ranks.
    pub fn reducing(collective: Collective, dtype: DType, op: ReduceOp, count: usize, job: &Job) -> Case {
        let (me, n) = (job.rank(), job.size());
        let is_whole = collective == Collective::AllReduce;
        let length = if is_whole { count } else { n * count };
        let of = |rank: usize| (0..length).map(move |i| small(dtype, op, rank, i));
        let result = |i: usize| {
            let values: Vec<i64> = (0..n).map(|rank| small(dtype, op, rank, i)).collect();
            reduced(dtype, op, &values)
        };
        let first = if is_whole { 0 } else { me * count };
        let input: Vec<i64> = of(me).collect();
        let before = if is_whole { input.clone() } else { vec![0; count] };
        let after = (first..first + count).map(result).collect();
        let call = DeviceCall { op, ..call(collective, dtype, count, 0) };
        Case { call, input, before, after, in_place: is_whole }
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

    pub fn with_root(&self, root: usize) -> Case {
        Case { call: DeviceCall { root, ..self.call.clone() }, ..self.clone() }
    }

    /// The call and its result, from the start to the end.
    pub fn run(&self, job: &Job, group: &Group) {
        let memory = self.start(job, group);
        job.synchronize();
        self.check(job, &memory);
    }

    pub fn start(&self, job: &Job, group: &Group) -> Placed {
        self.try_start(job, group).unwrap()
    }

    /// Enqueues the call behind the copies of its data.
    pub fn try_start(&self, job: &Job, group: &Group) -> Result<Placed> {
        self.begin(job, group).map(|(placed, _)| placed)
    }

    /// As `try_start`, with what tells how the call goes.
    pub fn begin(&self, job: &Job, group: &Group) -> Result<(Placed, StartedOnDevice)> {
        let placed = self.place(job);
        let started = self.launch(group, &placed, job.stream_address(), None);
        if started.is_err() {
            self.free(job, &placed);
        }
        started.map(|started| (placed, started))
    }

    /// Memory with the call's data in it once the rank's stream comes there.
    pub fn place(&self, job: &Job) -> Placed {
        let dtype = self.call.dtype;
        let output = job.memory(&bytes(dtype, &self.before));
        let input = if self.in_place { output } else { job.memory(&bytes(dtype, &self.input)) };
        Placed { input, output }
    }

    /// Enqueues the call alone.
    pub fn launch(
        &self,
        group: &Group,
        placed: &Placed,
        stream: u64,
        behind: Option<u64>,
    ) -> Result<StartedOnDevice> {
        let Placed { input, output } = *placed;
        let call = DeviceCall { input, output, ..self.call.clone() };
        // SAFETY: freed only after the stream was waited for.
        unsafe { group.device.start(&call, stream, behind) }
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
