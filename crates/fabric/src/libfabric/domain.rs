//! [`Domain`] over one libfabric RDM endpoint. The same code serves every provider; what differs is in [`Caps`].

use std::ffi::{c_int, c_void};
use std::os::fd::RawFd;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use smddp_core::memory::{Owner, Region};
use smddp_libfabric_sys::Library;
use smddp_libfabric_sys::abi::*;
use smddp_libfabric_sys::calls::{self, Target};

use super::knock::Knock;
use super::nics::{Info, Nic, NicInfo, call_error, socket_address};
use crate::domain::{Armed, Caps, Completion, Domain, Mr, PeerAddr, Post, Refused, Remote};
use crate::error::Error;

/// Completions read at a time.
const BATCH: usize = 32;
/// Completions the queue holds at least.
const QUEUE: usize = 4096;
/// The provider that answers "again" both while it connects and for ever after the peer has gone, or has refused: no
/// error ever tells. Others mean full queues and credits by it, however long it lasts.
const TELLS_NO_END: &str = "tcp";
/// A peer that was reached before is given up after so long, or once its host says that nobody listens there, which is asked after
/// `DOUBT`. It takes one without work, which looks every 100 ms, two looks to accept a connection, and a second if a packet of it is
/// lost; and must be less than a withdrawn group is waited for.
const RECONNECT: Duration = Duration::from_millis(1500);
const DOUBT: Duration = Duration::from_millis(100);
/// One that never was, after so long: its process may be slow to answer at first.
const FIRST_CONTACT: Duration = Duration::from_secs(30);
/// Who has not tried for so long was asleep itself, and begins anew.
const PAUSE: Duration = Duration::from_secs(1);

/// What "again" from a peer's connection has meant so far, where the provider is [`TELLS_NO_END`].
#[derive(Clone, Copy, Debug, Default)]
struct Reach {
    reached: bool,
    /// The first and the last "again" since a post went through.
    again: Option<(Instant, Instant)>,
}

impl Reach {
    fn posted(&mut self) {
        *self = Reach { reached: true, again: None };
    }

    /// Takes note of an "again"; true when there were so many that the peer is given up.
    fn again(&mut self, now: Instant) -> bool {
        let since = match self.again {
            Some((since, last)) if now.duration_since(last) < PAUSE => since,
            _ => now,
        };
        self.again = Some((since, now));
        now.duration_since(since) > if self.reached { RECONNECT } else { FIRST_CONTACT }
    }

    /// Whether a peer that was reached may have ended.
    fn is_doubtful(&self) -> bool {
        self.reached && self.again.is_some_and(|(since, last)| last.duration_since(since) > DOUBT)
    }

    fn reason(&self, address: &[u8]) -> String {
        if self.reached {
            return "its connection is closed and cannot be made again".to_owned();
        }
        let address = socket_address(address).map_or_else(|| "it".to_owned(), |known| known.to_string());
        format!(
            "no connection to {address} in {} s: its process has ended, or a firewall is between; open all ports between \
             the nodes, or choose another network with SMDDP_NICS",
            FIRST_CONTACT.as_secs()
        )
    }
}

/// A peer whose "again" may mean a lost connection.
#[derive(Default)]
struct Contact {
    reach: Reach,
    address: Vec<u8>,
    /// While it is doubtful.
    knock: Option<Knock>,
}

impl Contact {
    fn posted(&mut self) {
        self.reach.posted();
        self.knock = None;
    }

    /// Takes note of an "again"; why the peer is given up where it is.
    fn again(&mut self, now: Instant) -> Option<String> {
        let is_late = self.reach.again(now);
        if !self.reach.is_doubtful() {
            self.knock = None;
        } else if self.knock.is_none() {
            self.knock = socket_address(&self.address).map(Knock::at);
        }
        let is_refused = self.knock.as_mut().is_some_and(Knock::is_refused);
        if !is_late && !is_refused {
            return None;
        }
        self.knock = None;
        Some(self.reach.reason(&self.address))
    }
}

/// One NIC's endpoint.
pub struct LibfabricDomain {
    library: Arc<Library>,
    nic: NicInfo,
    caps: Caps,
    fabric: *mut fid_fabric,
    domain: *mut fid_domain,
    av: *mut fid_av,
    cq: *mut fid_cq,
    ep: *mut fid_ep,
    name: Vec<u8>,
    wait: Option<RawFd>,
    mrs: Vec<*mut fid_mr>,
    free_mrs: Vec<u32>,
    /// Keys are never used again, so that a late write finds no other transfer's memory.
    next_key: u64,
    /// Of each peer; empty where "again" never means a lost connection.
    contacts: Vec<Contact>,
    start: Instant,
    entries: [fi_cq_tagged_entry; BATCH],
}

// SAFETY: the objects are used by one thread at a time (D4), and libfabric ties none of them to a thread.
unsafe impl Send for LibfabricDomain {}

const NOTHING: fi_cq_tagged_entry = fi_cq_tagged_entry {
    op_context: ptr::null_mut(),
    flags: 0,
    len: 0,
    buf: ptr::null_mut(),
    data: 0,
    tag: 0,
};

impl LibfabricDomain {
    /// Opens an endpoint on `nic`.
    pub fn open(library: &Arc<Library>, nic: Nic) -> Result<LibfabricDomain, Error> {
        let Nic { info: about, raw } = nic;
        let mut opened = LibfabricDomain {
            library: library.clone(),
            // SAFETY: the info is owned by `raw`, with all attributes set by the library.
            caps: unsafe { caps(&*raw.ptr, about.address.is_some(), about.provider == TELLS_NO_END) },
            nic: about,
            fabric: ptr::null_mut(),
            domain: ptr::null_mut(),
            av: ptr::null_mut(),
            cq: ptr::null_mut(),
            ep: ptr::null_mut(),
            name: Vec::new(),
            wait: None,
            mrs: Vec::new(),
            free_mrs: Vec::new(),
            next_key: 1,
            contacts: Vec::new(),
            start: Instant::now(),
            entries: [NOTHING; BATCH],
        };
        // A failure half-way drops `opened`, which closes what there is.
        // SAFETY: `raw` outlives the calls; every object is live once its call has succeeded.
        unsafe { opened.build(&raw)? };
        Ok(opened)
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        Err(call_error(&self.library, call, &self.nic.name, code as isize))
    }

    /// # Safety
    /// `info` describes this NIC; nothing was opened before.
    unsafe fn build(&mut self, info: &Info) -> Result<(), Error> {
        let info = info.ptr;
        // SAFETY: live objects and out-pointers throughout; attributes are zeroed and in full (A1).
        unsafe {
            let code = (self.library.fi_fabric)((*info).fabric_attr, &mut self.fabric, ptr::null_mut());
            self.check("fi_fabric", code)?;
            let code = calls::domain(self.fabric, info, &mut self.domain);
            self.check("fi_domain", code)?;
            let mut av: fi_av_attr = std::mem::zeroed();
            av.kind = FI_AV_TABLE;
            let code = calls::av_open(self.domain, &mut av, &mut self.av);
            self.check("fi_av_open", code)?;
            self.open_cq()?;
            let code = calls::endpoint(self.domain, info, &mut self.ep);
            self.check("fi_endpoint", code)?;
            let ep = &raw mut (*self.ep).fid;
            let code = calls::bind(ep, &raw mut (*self.av).fid, 0);
            self.check("fi_ep_bind", code)?;
            let code = calls::bind(ep, &raw mut (*self.cq).fid, FI_SEND | FI_RECV);
            self.check("fi_ep_bind", code)?;
            if self.nic.provider.starts_with("efa") || self.caps.devices {
                // CUDA calls of the provider's can deadlock with a parked stream. One that cannot do without them reaches
                // no device from its NIC.
                let no = 0u8;
                let code = calls::setopt(self.ep, FI_OPT_CUDA_API_PERMITTED, (&raw const no).cast(), 1);
                self.caps.devices &= code == 0;
            }
            let code = calls::control(ep, FI_ENABLE, ptr::null_mut());
            self.check("fi_enable", code)?;
            let mut name = [0u8; 256];
            let mut len = name.len();
            let code = calls::getname(self.ep, name.as_mut_ptr().cast(), &mut len);
            self.check("fi_getname", code)?;
            self.name = name[..len.min(name.len())].to_vec();
        }
        Ok(())
    }

    /// The completion queue, with a descriptor to sleep on where the provider has one cheaply.
    ///
    /// # Safety
    /// The domain is open.
    unsafe fn open_cq(&mut self) -> Result<(), Error> {
        // SAFETY: a live domain, attributes in full (A1), `fd` is what FI_GETWAIT of FI_WAIT_FD writes.
        unsafe {
            let mut attr: fi_cq_attr = std::mem::zeroed();
            attr.size = QUEUE;
            attr.format = FI_CQ_FORMAT_TAGGED;
            attr.wait_obj = FI_WAIT_FD;
            if self.caps.sockets && calls::cq_open(self.domain, &mut attr, &mut self.cq) == 0 {
                let mut fd: c_int = -1;
                let cq = &raw mut (*self.cq).fid;
                if calls::control(cq, FI_GETWAIT, (&raw mut fd).cast()) == 0 && fd >= 0 {
                    self.wait = Some(fd);
                }
                return Ok(());
            }
            attr.size = QUEUE;
            attr.wait_obj = FI_WAIT_NONE;
            let code = calls::cq_open(self.domain, &mut attr, &mut self.cq);
            self.check("fi_cq_open", code)
        }
    }

    fn desc(&self, mr: Option<Mr>) -> *mut c_void {
        match mr.and_then(|mr| self.mrs.get(mr.id as usize)) {
            // SAFETY: a live registration of this domain.
            Some(mr) if !mr.is_null() => unsafe { (**mr).mem_desc },
            _ => ptr::null_mut(),
        }
    }

    /// Turns the result of a post into ours; `to` is the peer, if it has one.
    fn posted(&mut self, code: isize, to: Option<PeerAddr>) -> Post {
        let contact = to.and_then(|to| self.contacts.get_mut(to as usize));
        if code == 0 {
            if let Some(contact) = contact {
                contact.posted();
            }
            return Ok(());
        }
        if code != -FI_EAGAIN {
            let text = format!("{} ({code})", self.library.error_text(code));
            return Err(if to.is_some() { Refused::Peer(text) } else { Refused::Broken(text) });
        }
        match contact.and_then(|contact| contact.again(Instant::now())) {
            Some(reason) => Err(Refused::Peer(reason)),
            None => Err(Refused::Again),
        }
    }

    /// True while the endpoint can be used.
    fn open_still(&self) -> Post {
        if self.ep.is_null() { Err(Refused::Broken("the endpoint is closed".to_owned())) } else { Ok(()) }
    }

    fn read_error(&mut self, out: &mut Vec<Completion>) -> Result<(), String> {
        // SAFETY: a zeroed entry in full (A1); the queue is open.
        let (code, e) = unsafe {
            let mut entry: fi_cq_err_entry = std::mem::zeroed();
            (calls::cq_readerr(self.cq, &mut entry), entry)
        };
        if code == -FI_EAGAIN {
            return Ok(());
        }
        if code < 0 {
            return Err(format!("fi_cq_readerr: {} ({code})", self.library.error_text(code)));
        }
        let incoming = e.flags & FI_REMOTE_WRITE != 0;
        out.push(Completion::Failed {
            ctx: if incoming { None } else { Some(e.op_context as u64) },
            data: if incoming && e.flags & FI_REMOTE_CQ_DATA != 0 { Some(e.data as u32) } else { None },
            peer: None,
            canceled: e.err == FI_ECANCELED,
            reason: match e.err {
                FI_ECANCELED => "connection closed by the peer".to_owned(),
                err => format!("{} ({err})", self.library.error_text(err as isize)),
            },
        });
        Ok(())
    }
}

/// # Safety
/// All attributes of `info` are set.
unsafe fn caps(info: &fi_info, sockets: bool, ordered: bool) -> Caps {
    // SAFETY: by the caller's word.
    let (ep, domain) = unsafe { (&*info.ep_attr, &*info.domain_attr) };
    Caps {
        rma: info.caps & FI_RMA != 0,
        needs_local_mr: domain.mr_mode & (FI_MR_LOCAL | FI_MR_ALLOCATED | FI_MR_PROV_KEY) != 0,
        virt_addr: domain.mr_mode & FI_MR_VIRT_ADDR != 0,
        prov_key: domain.mr_mode & FI_MR_PROV_KEY != 0,
        max_msg: ep.max_msg_size,
        devices: info.caps & FI_HMEM != 0,
        sockets,
        ordered,
    }
}

impl Domain for LibfabricDomain {
    fn caps(&self) -> Caps {
        self.caps
    }

    fn describe(&self) -> String {
        match self.nic.address {
            Some(address) => format!("{} ({address})", self.nic.name),
            None => self.nic.name.clone(),
        }
    }

    fn address(&self) -> &[u8] {
        &self.name
    }

    fn insert(&mut self, address: &[u8]) -> Result<PeerAddr, Error> {
        if address.len() != self.name.len() {
            return Err(Error::Address {
                label: self.nic.name.clone(),
                reason: format!("{} bytes, but this provider's have {}", address.len(), self.name.len()),
            });
        }
        let mut peer = FI_ADDR_UNSPEC;
        // SAFETY: the vector is open; one address of the provider's length.
        let code = unsafe { calls::av_insert(self.av, address.as_ptr().cast(), &mut peer) };
        if code != 1 || peer == FI_ADDR_UNSPEC {
            return Err(call_error(&self.library, "fi_av_insert", &self.nic.name, code.min(-1) as isize));
        }
        // Tables number from 0 (FI_AV_TABLE).
        if self.nic.provider == TELLS_NO_END {
            let at = peer as usize;
            self.contacts.resize_with(self.contacts.len().max(at + 1), Contact::default);
            // What had this address before was another process.
            self.contacts[at] = Contact { address: address.to_vec(), ..Contact::default() };
        }
        Ok(peer)
    }

    fn register(&mut self, memory: Region, owner: Owner, remote: bool) -> Result<Mr, Error> {
        if self.ep.is_null() || (!remote && !self.caps.needs_local_mr) {
            return Ok(Mr { id: u32::MAX, key: 0, base: 0 });
        }
        let access = FI_SEND | FI_RECV | FI_WRITE | if remote { FI_REMOTE_WRITE } else { 0 };
        let key = if self.caps.prov_key { 0 } else { self.next_key };
        self.next_key += 1;
        let mut mr = ptr::null_mut();
        let (start, len) = (memory.as_ptr().cast(), memory.len());
        match owner {
            Owner::Host => {
                // SAFETY: the domain is open; the memory stays valid until `deregister` or `close` (R1).
                let code = unsafe { calls::mr_reg(self.domain, start, len, access, key, &mut mr) };
                self.check("fi_mr_reg", code)?;
            }
            Owner::Cuda(device) => {
                let part = iovec { iov_base: start, iov_len: len };
                // SAFETY: plain data, for which zero is "none".
                let mut attr: fi_mr_attr = unsafe { std::mem::zeroed() };
                (attr.mr_iov, attr.iov_count) = (&raw const part, 1);
                (attr.access, attr.requested_key) = (access, key);
                (attr.iface, attr.device) = (FI_HMEM_CUDA, device as u32 as u64);
                // SAFETY: as above; the attributes are in full (A1).
                let code = unsafe { calls::mr_regattr(self.domain, &attr, &mut mr) };
                self.check("fi_mr_regattr", code)?;
            }
        }
        let id = match self.free_mrs.pop() {
            Some(id) => {
                self.mrs[id as usize] = mr;
                id
            }
            None => {
                self.mrs.push(mr);
                (self.mrs.len() - 1) as u32
            }
        };
        let base = if self.caps.virt_addr { memory.as_ptr() as u64 } else { 0 };
        // SAFETY: a live registration.
        Ok(Mr { id, key: unsafe { (*mr).key }, base })
    }

    fn deregister(&mut self, mr: Mr) {
        let Some(place) = self.mrs.get_mut(mr.id as usize) else { return };
        if !place.is_null() {
            // SAFETY: a live registration, closed once.
            unsafe { calls::close(&raw mut (**place).fid) };
            *place = ptr::null_mut();
            self.free_mrs.push(mr.id);
        }
    }

    fn send(&mut self, to: PeerAddr, from: Region, mr: Mr, ctx: u64) -> Post {
        self.open_still()?;
        let desc = self.desc(Some(mr));
        // SAFETY: the endpoint is open; the region stays until its completion (D2).
        let code =
            unsafe { calls::send(self.ep, from.as_ptr().cast(), from.len(), desc, to, ctx as *mut c_void) };
        self.posted(code, Some(to))
    }

    fn recv(&mut self, into: Region, mr: Mr, ctx: u64) -> Post {
        self.open_still()?;
        let desc = self.desc(Some(mr));
        // SAFETY: as in `send`.
        let code =
            unsafe { calls::recv(self.ep, into.as_ptr().cast(), into.len(), desc, ctx as *mut c_void) };
        self.posted(code, None)
    }

    fn write(&mut self, to: Remote, from: Region, mr: Option<Mr>, data: u32, ctx: u64) -> Post {
        self.open_still()?;
        let desc = self.desc(mr);
        let target = Target { peer: to.peer, addr: to.addr, key: to.key };
        let (start, data) = (from.as_ptr().cast(), u64::from(data));
        // SAFETY: as in `send`.
        let code =
            unsafe { calls::writedata(self.ep, start, from.len(), desc, data, target, ctx as *mut c_void) };
        self.posted(code, Some(to.peer))
    }

    fn tagged_send(&mut self, to: PeerAddr, from: Region, mr: Option<Mr>, tag: u64, ctx: u64) -> Post {
        self.open_still()?;
        let (desc, start) = (self.desc(mr), from.as_ptr().cast());
        // SAFETY: as in `send`.
        let code = unsafe { calls::tsend(self.ep, start, from.len(), desc, to, tag, ctx as *mut c_void) };
        self.posted(code, Some(to))
    }

    fn tagged_recv(&mut self, into: Region, mr: Option<Mr>, tag: u64, ctx: u64) -> Post {
        self.open_still()?;
        let (desc, start) = (self.desc(mr), into.as_ptr().cast());
        // SAFETY: as in `send`.
        let code = unsafe { calls::trecv(self.ep, start, into.len(), desc, tag, ctx as *mut c_void) };
        self.posted(code, None)
    }

    fn poll(&mut self, out: &mut Vec<Completion>) -> Result<(), String> {
        if self.ep.is_null() {
            return Err("the endpoint is closed".to_owned());
        }
        // SAFETY: the queue is open; the buffer has room for BATCH entries of its format.
        let code = unsafe { calls::cq_read(self.cq, self.entries.as_mut_ptr().cast(), BATCH) };
        if code == -FI_EAVAIL {
            return self.read_error(out);
        }
        if code < 0 {
            if code == -FI_EAGAIN {
                return Ok(());
            }
            return Err(format!("fi_cq_read: {} ({code})", self.library.error_text(code)));
        }
        for entry in &self.entries[..(code as usize).min(BATCH)] {
            out.push(if entry.flags & FI_REMOTE_WRITE != 0 {
                Completion::Arrived { data: entry.data as u32 }
            } else {
                Completion::Done { ctx: entry.op_context as u64, len: entry.len }
            });
        }
        Ok(())
    }

    fn cancel(&mut self, ctx: u64) {
        if !self.ep.is_null() {
            // SAFETY: the endpoint is open.
            unsafe { calls::cancel(self.ep, ctx as *mut c_void) };
        }
    }

    fn arm(&mut self) -> Armed {
        let Some(fd) = self.wait else { return Armed::Blind };
        if self.ep.is_null() {
            return Armed::Blind;
        }
        // SAFETY: both objects are open.
        let code = unsafe {
            let mut object = &raw mut (*self.cq).fid;
            calls::trywait(self.fabric, &mut object, 1)
        };
        if code == 0 { Armed::Fd(fd) } else { Armed::Ready }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    fn close(&mut self, stuck: bool) {
        let close = |object: *mut fid| {
            if !object.is_null() {
                // SAFETY: an open object, closed once; users before what they use.
                let code = unsafe { calls::close(object) };
                if code != 0 {
                    tracing::warn!(code, "closing a libfabric object");
                }
            }
        };
        self.wait = None;
        let ep: *mut fid = std::mem::replace(&mut self.ep, ptr::null_mut()).cast();
        // EFA's waits for what is in flight, up to libfabric 2.1 without end where a peer is stopped, and takes in what comes
        // meanwhile. Left open it does nothing, since it progresses in our calls alone (FI_PROGRESS_MANUAL), and once no memory is
        // registered any more the NIC reaches none of ours (D2): nothing is cached of registrations with FI_MR_LOCAL.
        let is_left = stuck && self.nic.provider.starts_with("efa") && !ep.is_null();
        if !is_left {
            close(ep);
        }
        for mr in self.mrs.drain(..) {
            close(mr.cast());
        }
        self.free_mrs.clear();
        if is_left {
            tracing::warn!(
                nic = self.nic.name,
                "an endpoint is left open: peers do not take what was sent to them"
            );
            (self.cq, self.av) = (ptr::null_mut(), ptr::null_mut());
            (self.domain, self.fabric) = (ptr::null_mut(), ptr::null_mut());
            return;
        }
        close(std::mem::replace(&mut self.cq, ptr::null_mut()).cast());
        close(std::mem::replace(&mut self.av, ptr::null_mut()).cast());
        close(std::mem::replace(&mut self.domain, ptr::null_mut()).cast());
        close(std::mem::replace(&mut self.fabric, ptr::null_mut()).cast());
    }
}

impl Drop for LibfabricDomain {
    fn drop(&mut self) {
        self.close(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tries every 10 ms; after how long the peer is given up.
    fn patience(mut reach: Reach) -> Duration {
        let start = Instant::now();
        let step = Duration::from_millis(10);
        (1..).map(|n| n * step).find(|&waited| reach.again(start + waited)).unwrap() - step
    }

    #[test]
    fn a_peer_that_was_never_reached_is_given_up_later_and_by_its_address() {
        let (fresh, mut known) = (Reach::default(), Reach::default());
        known.posted();
        let step = Duration::from_millis(10);
        assert_eq!(patience(known), RECONNECT + step);
        assert_eq!(patience(fresh), FIRST_CONTACT + step);
        let address = [&2u16.to_ne_bytes()[..], &80u16.to_be_bytes(), &[10, 0, 0, 7], &[0; 8]].concat();
        let reason = fresh.reason(&address);
        assert!(reason.contains("10.0.0.7:80") && reason.contains("firewall"), "{reason}");
    }

    /// One over tcp, if that can be had.
    fn opened() -> Option<LibfabricDomain> {
        let mut settings = smddp_core::settings::Settings::from_env().unwrap();
        settings.set("SMDDP_NICS", "lo").unwrap();
        settings.set("SMDDP_PROVIDER", "tcp").unwrap();
        let dirs: Vec<_> = std::env::var("VIRTUAL_ENV").map(std::path::PathBuf::from).into_iter().collect();
        let library = match crate::open::load(&settings, &dirs) {
            Ok(library) => library,
            Err(error) => {
                let required = std::env::var("SMDDP_TEST_REQUIRE_LIBFABRIC").is_ok_and(|v| v == "1");
                assert!(!required, "SMDDP_TEST_REQUIRE_LIBFABRIC=1, but: {error}");
                eprintln!("NOT RUN: {error}");
                return None;
            }
        };
        let wish = super::super::nics::Wish::of(&settings, super::super::Place::ALONE);
        let nic = super::super::nics::find(&library, &wish).unwrap().remove(0);
        Some(LibfabricDomain::open(&library, nic).unwrap())
    }

    /// A healthy peer may be slow; it takes the knock in, and is not kept awake by it.
    #[test]
    fn a_knock_leaves_nothing_behind() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let Some(mut domain) = opened() else { return };
        let address = socket_address(domain.address()).unwrap();
        let is_awake = |domain: &mut LibfabricDomain| {
            let Armed::Fd(fd) = domain.arm() else { return true };
            // SAFETY: the queue stays open.
            let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(fd) };
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap()
                > 0
        };
        for early in [true, false] {
            let mut knock = Knock::at(address);
            let start = Instant::now();
            while !early && !is_awake(&mut domain) {
                assert!(start.elapsed() < Duration::from_secs(60));
            }
            for _ in 0..if early { 0 } else { 10 } {
                domain.poll(&mut Vec::new()).unwrap();
            }
            assert!(!knock.is_refused());
            drop(knock);
            while is_awake(&mut domain) {
                assert!(start.elapsed() < Duration::from_secs(20), "early {early}");
                domain.poll(&mut Vec::new()).unwrap();
            }
        }
    }

    /// Closing one of EFA's may last as long as peers are stuck. (This one only goes by that name.)
    #[test]
    fn what_is_stuck_over_efa_is_left_open_without_its_memory() {
        for (provider, stuck) in [("efa", true), ("efa", false), ("tcp", true)] {
            let Some(mut domain) = opened() else { return };
            let address = socket_address(domain.address()).unwrap();
            let mut memory = [0u8; 100];
            // SAFETY: the memory outlives the domain.
            let region = unsafe { Region::of(&mut memory) };
            let mr = domain.register(region, Owner::Host, true).unwrap();
            assert!(!domain.mrs[mr.id as usize].is_null());
            domain.nic.provider = provider.to_owned();
            domain.close(stuck);
            assert!(domain.mrs.is_empty() && domain.poll(&mut Vec::new()).is_err());
            let is_open = std::net::TcpStream::connect(address).is_ok();
            assert_eq!(is_open, stuck && provider == "efa", "{provider}, stuck: {stuck}");
        }
    }

    /// A process may get the address of one that has ended.
    #[test]
    fn who_has_the_address_of_another_was_never_reached() {
        let Some(mut domain) = opened() else { return };
        let address = domain.address().to_vec();
        let first = domain.insert(&address).unwrap();
        domain.contacts[first as usize].posted();
        let second = domain.insert(&address).unwrap();
        assert_eq!(first, second, "the provider names addresses");
        assert!(!domain.contacts[second as usize].reach.reached);
    }

    #[test]
    fn who_did_not_try_has_not_waited() {
        let (start, mut reach) = (Instant::now(), Reach::default());
        for n in 0..10 {
            assert!(!reach.again(start + n * FIRST_CONTACT));
        }
        reach.posted();
        assert!(!reach.again(start + 11 * FIRST_CONTACT));
    }
}
