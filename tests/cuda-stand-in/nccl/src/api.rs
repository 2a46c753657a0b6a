//! The exported functions of NCCL.

use crate::comm::{self, Comm, Place, Scalar};
use crate::driver;
use crate::dtype::DType;
use crate::error::{self, Code, Error, Result, lock};
use crate::group;
use crate::operation::{Arguments, Operation};
use crate::server;
use crate::wire::Kind;
use smddp_standin::switches::Switches;
use std::ffi::{c_char, c_int, c_void};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicI32, Ordering};

pub const UNIQUE_ID_BYTES: usize = 128;
const CONFIG_MAGIC: u32 = 0xcafe_beef;
const UNDEFINED: c_int = c_int::MIN;
const NO_COLOR: c_int = -1;

/// ncclUniqueId.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([u8; UNIQUE_ID_BYTES]);

/// What all versions of ncclConfig_t begin with.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

/// A C caller's pointer to where a result goes, or from where an argument comes. Only the C ABI makes one.
#[repr(transparent)]
pub struct Pointer<T>(*mut T);

impl<T: Copy> Pointer<T> {
    fn set(&self, value: T, name: &str) -> Result {
        self.check(name)?;
        // SAFETY: the C caller passed it as the place of a result of this type.
        unsafe { self.0.write(value) };
        Ok(())
    }

    fn get(&self, name: &str) -> Result<T> {
        self.check(name)?;
        // SAFETY: the C caller passed it as an argument of this type.
        Ok(unsafe { self.0.read() })
    }

    fn check(&self, name: &str) -> Result {
        if self.0.is_null() {
            return Err(Error::new(Code::INVALID_ARGUMENT, format!("{name} argument is NULL")));
        }
        Ok(())
    }
}

macro_rules! api {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident: $type:ty),* $(,)?) $body:block)*) => {$(
        $(#[$doc])*
        #[unsafe(no_mangle)]
        pub extern "C" fn $name($($arg: $type),*) -> c_int {
            call(stringify!($name), || -> Result { $body })
        }
    )*};
}

fn call(name: &str, body: impl FnOnce() -> Result) -> c_int {
    let checked = || match driver::enter(name) {
        0 => body(),
        code => Err(Error::new(Code(code), format!("{name} failed, as SMDDP_STANDIN_FAIL asked"))),
    };
    // A panic must not cross into C.
    match catch_unwind(AssertUnwindSafe(checked)) {
        Ok(Ok(())) => 0,
        Ok(Err(error)) => {
            if error.code != Code::IN_PROGRESS {
                error::set_last(&error.text);
                group::spoil(&error);
            }
            error.code.0
        }
        Err(_) => Code::INTERNAL.0,
    }
}

fn blocking(config: &Pointer<Config>) -> Result<bool> {
    if config.0.is_null() {
        return Ok(true);
    }
    let mut config = config.get("config")?;
    // As NCCL_COMM_BLOCKING overrides all programs.
    if let Some(set) = std::env::var("NCCL_COMM_BLOCKING").ok().and_then(|value| value.parse().ok()) {
        config.blocking = set;
    }
    if config.magic != CONFIG_MAGIC || config.size < size_of::<Config>() {
        let text = "ncclConfig_t argument not initialized via NCCL_CONFIG_INITIALIZER";
        return Err(Error::new(Code::INVALID_ARGUMENT, text));
    }
    match config.blocking {
        UNDEFINED | 1 => Ok(true),
        0 => Ok(false),
        other => {
            let text = format!("Invalid config blocking attribute value {other}");
            Err(Error::new(Code::INVALID_ARGUMENT, text))
        }
    }
}

fn init(out: &Pointer<usize>, ranks: c_int, id: UniqueId, rank: c_int, blocking: bool) -> Result {
    out.set(0, "comm")?;
    let invalid = |text: String| Error::new(Code::INVALID_ARGUMENT, text);
    let (Ok(ranks), Ok(rank)) = (usize::try_from(ranks), usize::try_from(rank)) else {
        return Err(invalid(format!("Invalid rank requested : {rank}/{ranks}")));
    };
    if rank >= ranks {
        return Err(invalid(format!("Invalid rank requested : {rank}/{ranks}")));
    }
    let end = id.0.iter().position(|byte| *byte == 0).unwrap_or(UNIQUE_ID_BYTES);
    let name = std::str::from_utf8(&id.0[..end]).ok().filter(|name| name.starts_with("smddp-standin-"));
    let server = name.ok_or_else(|| invalid("the unique id is not ncclGetUniqueId's".into()))?.to_string();
    enter_room(out, Place { server, room: 0 }, rank, ranks, blocking, driver::current_device()?)
}

fn enter_room(
    out: &Pointer<usize>,
    place: Place,
    rank: usize,
    ranks: usize,
    blocking: bool,
    device: i32,
) -> Result {
    let joining = Comm::join(place, rank, ranks, device, blocking)?;
    let handle = comm::enlist(&joining);
    out.set(handle, "newcomm")?;
    let joined = comm::finish_join(joining, handle, blocking);
    if blocking && joined.is_err() {
        out.set(0, "newcomm")?;
    }
    joined
}

/// The communicator, if calls can use it.
fn usable(handle: usize, function: &str) -> Result<std::sync::Arc<Comm>> {
    let comm = comm::find(handle, function)?;
    let early = || {
        let text = "Attempt to use communicator before the previous operation returned ncclSuccess";
        Error::new(Code::INVALID_ARGUMENT, text)
    };
    match comm.has_joined() {
        Some(joined) => joined?,
        None if group::is_open() => {}
        None => return Err(early()),
    }
    if comm.is_launching() {
        return Err(early());
    }
    comm.check()?;
    Ok(comm)
}

fn collective(kind: Kind, args: &Arguments, comm: usize, stream: usize) -> Result {
    let comm = usable(comm, "collective")?;
    let operation = Operation::collective(&comm, kind, args)?;
    if comm.ranks == 1 {
        return operation.copy(stream);
    }
    group::add(comm, operation, stream)
}

api! {
    fn ncclGetVersion(out: Pointer<c_int>) {
        out.set(Switches::get().nccl_version, "version")
    }

    fn ncclGetUniqueId(out: Pointer<UniqueId>) {
        let name = server::start().map_err(|why| Error::new(Code::SYSTEM, why.to_string()))?;
        let mut id = UniqueId([0; UNIQUE_ID_BYTES]);
        id.0[..name.len()].copy_from_slice(name.as_bytes());
        out.set(id, "uniqueId")
    }

    fn ncclCommInitRank(out: Pointer<usize>, ranks: c_int, id: UniqueId, rank: c_int) {
        init(&out, ranks, id, rank, true)
    }

    fn ncclCommInitRankConfig(out: Pointer<usize>, ranks: c_int, id: UniqueId, rank: c_int, config: Pointer<Config>) {
        init(&out, ranks, id, rank, blocking(&config)?)
    }

    fn ncclCommSplit(comm: usize, color: c_int, key: c_int, out: Pointer<usize>, config: Pointer<Config>) {
        let parent = usable(comm, "CommSplit")?;
        let blocking = blocking(&config)?;
        out.set(0, "newcomm")?;
        if color < NO_COLOR {
            return Err(Error::new(Code::INVALID_ARGUMENT, format!("color {color} is invalid")));
        }
        let device = parent.device;
        group::later_or_now(Box::new(move || match parent.split(color, key)? {
            None => Ok(()),
            Some((place, rank, ranks)) => enter_room(&out, place, rank, ranks, blocking, device),
        }))
    }

    fn ncclCommFinalize(comm: usize) {
        comm::find(comm, "CommFinalize")?.drain()
    }

    fn ncclCommDestroy(comm: usize) {
        // Null is fine, as it is for free.
        if comm == 0 {
            return Ok(());
        }
        let found = comm::find(comm, "CommDestroy")?;
        // As NCCL's: what has failed, or is in a call, is refused and stays, and the thread is left in a group of nobody's.
        let code = found.async_error();
        if code != 0 {
            group::start();
            return Err(Error::new(Code(code), format!("CommDestroy : comm {comm:#x} has failed, or is not ready")));
        }
        let drained = found.drain();
        comm::strike(comm);
        found.close();
        drained
    }

    fn ncclCommAbort(comm: usize) {
        if comm == 0 {
            return Ok(());
        }
        let found = comm::find(comm, "CommAbort")?;
        group::later_or_now(Box::new(move || {
            comm::strike(comm);
            found.abort()
        }))
    }

    fn ncclCommGetAsyncError(comm: usize, out: Pointer<c_int>) {
        out.set(comm::find(comm, "GetAsyncError")?.async_error(), "asyncError")
    }

    fn ncclCommCount(comm: usize, out: Pointer<c_int>) {
        out.set(comm::find(comm, "CommCount")?.ranks as c_int, "count")
    }

    fn ncclCommUserRank(comm: usize, out: Pointer<c_int>) {
        out.set(comm::find(comm, "CommUserRank")?.rank as c_int, "rank")
    }

    fn ncclCommCuDevice(comm: usize, out: Pointer<c_int>) {
        out.set(comm::find(comm, "CommCuDevice")?.device, "device")
    }

    fn ncclGroupStart() {
        group::start();
        Ok(())
    }

    fn ncclGroupEnd() {
        group::end()
    }

    fn ncclAllReduce(from: usize, to: usize, count: usize, dtype: c_int, op: c_int, comm: usize, stream: usize) {
        collective(Kind::AllReduce, &Arguments { from, to, count, dtype, op, root: 0 }, comm, stream)
    }

    fn ncclReduceScatter(from: usize, to: usize, count: usize, dtype: c_int, op: c_int, comm: usize, stream: usize) {
        collective(Kind::ReduceScatter, &Arguments { from, to, count, dtype, op, root: 0 }, comm, stream)
    }

    fn ncclAllGather(from: usize, to: usize, count: usize, dtype: c_int, comm: usize, stream: usize) {
        collective(Kind::AllGather, &Arguments { from, to, count, dtype, op: 0, root: 0 }, comm, stream)
    }

    fn ncclBroadcast(from: usize, to: usize, count: usize, dtype: c_int, root: c_int, comm: usize, stream: usize) {
        collective(Kind::Broadcast, &Arguments { from, to, count, dtype, op: 0, root }, comm, stream)
    }

    fn ncclBcast(buffer: usize, count: usize, dtype: c_int, root: c_int, comm: usize, stream: usize) {
        let args = Arguments { from: buffer, to: buffer, count, dtype, op: 0, root };
        collective(Kind::Broadcast, &args, comm, stream)
    }

    fn ncclReduce(from: usize, to: usize, count: usize, dtype: c_int, op: c_int, root: c_int, comm: usize, stream: usize) {
        collective(Kind::Reduce, &Arguments { from, to, count, dtype, op, root }, comm, stream)
    }

    fn ncclSend(from: usize, count: usize, dtype: c_int, peer: c_int, comm: usize, stream: usize) {
        let comm = usable(comm, "Send")?;
        let operation = Operation::send(&comm, from, count, dtype, peer)?;
        group::add(comm, operation, stream)
    }

    fn ncclRecv(to: usize, count: usize, dtype: c_int, peer: c_int, comm: usize, stream: usize) {
        let comm = usable(comm, "Recv")?;
        let operation = Operation::receive(&comm, to, count, dtype, peer)?;
        group::add(comm, operation, stream)
    }

    fn ncclRedOpCreatePreMulSum(out: Pointer<c_int>, scalar: *const c_void, dtype: c_int, residence: c_int, comm: usize) {
        let comm = usable(comm, "RedOpCreatePreMulSum")?;
        let size = DType::of(dtype)?.size();
        if scalar.is_null() {
            return Err(Error::new(Code::INVALID_ARGUMENT, "scalar argument is NULL"));
        }
        let scalar = match residence {
            0 => Scalar::Device(scalar as usize),
            1 => {
                let mut word = [0u8; 8];
                // SAFETY: the C caller's scalar, which has the size of its type, at most that of `word`.
                unsafe { word.as_mut_ptr().copy_from(scalar.cast(), size) };
                Scalar::Immediate(word)
            }
            other => {
                let text = format!("residence {other} is neither ncclScalarDevice nor ncclScalarHostImmediate");
                return Err(Error::new(Code::INVALID_ARGUMENT, text));
            }
        };
        static NEXT: AtomicI32 = AtomicI32::new(0x100);
        let op = NEXT.fetch_add(1, Ordering::Relaxed);
        lock(&comm.scalars).insert(op, (dtype, scalar));
        out.set(op, "op")
    }

    fn ncclRedOpDestroy(op: c_int, comm: usize) {
        let comm = comm::find(comm, "RedOpDestroy")?;
        let removed = lock(&comm.scalars).remove(&op);
        let unknown = || Error::new(Code::INVALID_ARGUMENT, format!("ncclRedOpDestroy : operator {op} unknown"));
        removed.map(|_| ()).ok_or_else(unknown)
    }

    fn ncclCommRegister(comm: usize, buffer: usize, size: usize, out: Pointer<usize>) {
        let comm = usable(comm, "CommRegister")?;
        driver::Buffer::new(buffer, size, "buff")?;
        let mut registered = lock(&comm.registered);
        let handle = registered.keys().last().map_or(1, |last| last + 1);
        registered.insert(handle, (buffer, size));
        out.set(handle, "handle")
    }

    fn ncclCommDeregister(comm: usize, handle: usize) {
        let comm = comm::find(comm, "CommDeregister")?;
        let removed = lock(&comm.registered).remove(&handle);
        let unknown = || Error::new(Code::INVALID_ARGUMENT, format!("registration {handle} is unknown"));
        removed.map(|_| ()).ok_or_else(unknown)
    }
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(code: c_int) -> *const c_char {
    error::describe(code).as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_comm: usize) -> *const c_char {
    error::last().as_ptr()
}
